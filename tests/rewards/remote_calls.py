"""Calls of the reward behind HTTP, and what they should give."""

import time

import torch
from judge import in_process

from rewards.remote import Remote

TOKEN = "s3cret-of-the-judge"
PROMPTS = ["a red circle", "a blue ring", "", 'a "quoted" word\n and an umlaut \u00fc', "five"]


def images(count=5):
    return torch.rand(count, 3, 8, 6, generator=torch.Generator().manual_seed(3))


def scored(judge, count=1, **options):
    return Remote(urls=judge.url, **options)(images(count), PROMPTS[:count]).tolist()


def expected(count=1):
    return torch.tensor(in_process(images(count), PROMPTS[:count]), dtype=torch.float32).tolist()


def hang(handler, body):
    time.sleep(30)
