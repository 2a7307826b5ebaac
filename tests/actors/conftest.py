import pytest
from fake_pool import World

from actors import pool as pool_module


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(pool_module, "done", world.done_of)
    monkeypatch.setattr(pool_module, "get", world.get)
    monkeypatch.setattr(pool_module.ray, "kill", world.kill)
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: world.now)
    return world
