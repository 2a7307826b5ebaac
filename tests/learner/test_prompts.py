"""Prompt files of five kinds, and sets; what is wrong with one is said with its name."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from commands import generate
from diffusion.base_model import BaseModel
from diffusion.parts import cut_prompts
from learner import api
from learner.config import ROOT, ConfigError, load_config, resolve
from learner.prompts import Prompt, metadata_of, prompts_digest, read_prompts
from learner.protocol.chunks import continuation_chunks, evaluation_chunks, training_chunks

PROMPTS = ["a red circle, large", 'a "quoted" ring', "ein grüner Würfel"]


def write(folder, kind: str, column: str = "prompt", prompts=PROMPTS):
    file = folder / f"prompts.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({column: prompts, "id": [1] * len(prompts)}), file)
        return file
    objects = [{column: prompt} for prompt in prompts]
    quoted = ['"' + prompt.replace('"', '""') + '"' for prompt in prompts]
    text = {
        "txt": "# comment\n\n" + "\n".join(prompts) + "\n",
        "json": json.dumps(objects, indent=1),
        "jsonl": "".join(json.dumps(row | {"id": i} if i else row) + "\n" for i, row in enumerate(objects)),
        "tsv": f"id\t{column}\n" + "".join(f"{i}\t{prompt}\n" for i, prompt in enumerate(quoted)),
        "csv": f"id,{column}\n" + "".join(f"{i},{prompt}\n" for i, prompt in enumerate(quoted)),
    }[kind]
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_gives_the_same_prompts_and_a_missing_column_names_those_there_are(tmp_path, kind):
    assert read_prompts(str(write(tmp_path, kind))) == PROMPTS
    if kind != "txt":
        file = str(write(tmp_path, kind, column="text"))
        assert read_prompts(file, "text") == PROMPTS
        with pytest.raises(ConfigError, match=r"prompts\.path: .*'prompt' \(prompts\.column\).*text"):
            read_prompts(file)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"\xff\xfe bad", "'utf-8' codec can't decode.*; save it as UTF-8"),
        ("p.txt", b"# nothing\n\n", "holds no prompt"),
        ("p.json", b"[]", "holds no prompt"),
        ("p.json", b'["a",', "Expecting value: line 1"),
        ("p.json", b'{"prompt": "a"}', "a JSON dict, expected a list"),
        ("p.json", b'["a", 3]', "item 2 has no text"),
        ("p.jsonl", b'{"prompt": "a"}\n{oops\n', "double quotes: line 2"),
        ("p.jsonl", b'{"prompt": 3}\n', "item 1 has no text"),
        ("p.parquet", b"not parquet", "cannot read"),
        ("p.csv", b"prompt\na red ring, large\n", "line 2 has more or fewer values"),
        ("p.csv", b"id,prompt\n1,a\n2\n", "line 3 has more or fewer values"),
        ("p.csv", b'prompt\n"no end\n', "unexpected end of data"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_prompts(str(tmp_path / name))
    assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_parquet_holds_text_or_categories_and_no_numbers_and_a_list_is_read_like_a_file(tmp_path):
    file = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": pa.array(["a", None, "a"]).dictionary_encode()}), file)
    assert read_prompts(str(file)) == ["a", "a"]
    pq.write_table(pa.table({"prompt": [1, 2]}), file)
    with pytest.raises(ConfigError, match="item 1 has no text under 'prompt'"):
        read_prompts(str(file))
    assert read_prompts([" a ring", "", "# no comment"]) == ["a ring", "# no comment"]
    with pytest.raises(ConfigError, match=r"prompts\.path: the list holds no prompt"):
        read_prompts([" "])


GENEVAL = [  # the form of its file; the sentences are ours
    {"tag": "counting", "include": [{"class": "cup", "count": 3}], "prompt": "three cups"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
]


def test_what_a_file_says_beside_its_prompts_travels_with_them(tmp_path, small_config):
    file = tmp_path / "geneval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    prompts = read_prompts(str(file))
    expected = [{key: row[key] for key in ("tag", "include")} for row in GENEVAL]
    assert prompts == ["three cups", "a red dog"] and list(metadata_of(prompts)) == expected
    config, of = small_config(), dict(zip(prompts, expected, strict=True))
    chunks = [
        *training_chunks(config, prompts, 0), *evaluation_chunks(config, prompts),
        *continuation_chunks(config, prompts, 3, [1], 2),
    ]  # fmt: skip
    assert all([of[prompt] for prompt in chunk.prompts] == list(chunk.metadata) for chunk in chunks)
    assert {type(prompt) for chunk in chunks for prompt in chunk.prompts} == {str}
    assert chunks[0].metadata_of([1, 0]) == (chunks[0].metadata[1], chunks[0].metadata[0])
    assert prompts_digest(prompts) != prompts_digest(["three cups", "a red dog"])
    bare = training_chunks(config, ["a", "b"], 0)[0]
    assert bare.metadata == () and bare.metadata_of([0]) == () and metadata_of(["a"]) == ()


def test_a_prompt_with_metadata_can_be_copied_and_so_sent_to_an_actor():
    prompt = copy.copy(Prompt("a red circle", {"text": "OPEN"}))
    assert prompt == "a red circle" and metadata_of([prompt]) == ({"text": "OPEN"},)


def test_of_tables_all_columns_that_json_can_hold_are_metadata(tmp_path):
    table = {"prompt": ["a", "b"], "count": [1, 2], "words": [["x"], []], "picture": [b"1", b"2"], "on": [True, False]}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    found = metadata_of(read_prompts(str(tmp_path / "p.parquet")))
    assert found == ({"count": 1, "words": ["x"], "on": True}, {"count": 2, "words": [], "on": False})
    (tmp_path / "p.tsv").write_text("text\tprompt\nSALE, today\ta sign\n")
    assert metadata_of(read_prompts(str(tmp_path / "p.tsv"))) == ({"text": "SALE, today"},)
    (tmp_path / "p.tsv").write_text("text\tprompt\nSALE\ta\tsign\n")
    with pytest.raises(ConfigError, match="line 2 has more or fewer values than the header names; quote tabs"):
        read_prompts(str(tmp_path / "p.tsv"))


def test_prompts_that_the_text_encoder_does_not_read_to_their_end_are_said_once(tmp_path, capsys):
    """Two that differ only there are one to it: a warning with count and first example, before a run and a picture."""
    start = "a red circle and a blue ring and a green square on a white"  # 14 words and two marks: 16 tokens
    long = [f"{start} background with a {thing}" for thing in ("cat", "dog")]
    model = BaseModel(str(resolve("models/shapes")))
    assert torch.equal(*model.embed(long))
    said = cut_prompts(model.path, [*long, start, long[0]])
    assert said.startswith("2 of 3 prompts are longer than the 16 tokens that ") and "\n" not in said
    assert said.endswith(f"of {long[0]!r} it reads {start!r}")
    presets = [read_prompts(str(file)) for file in (ROOT / "configs/prompts").glob("shapes*.txt")]
    assert presets and all(cut_prompts(model.path, prompts) is None for prompts in presets)

    heard = []
    config = load_config(overrides=["run.runner=inprocess", "reward.name=jpeg_compressibility"])
    config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"path": (*long, start)})})
    api.check(config, heard.append)
    assert heard == [said]
    arguments = ["--steps", "2", "--images", "1", "--guidance", "1", "--out", str(tmp_path / "x.png")]
    assert generate.main([*arguments, "--prompt", long[0], "--prompt", start]) == 0
    assert capsys.readouterr().err.startswith("learner.generate: warning: 1 of 2 prompts are longer than the 16 tokens")


def test_of_a_t5_what_it_cuts_counts_and_not_what_clip_does(tiny_flux, tiny_sd3):
    long = "a red circle and a blue ring and a green square on a white background"  # 14 words and an end
    assert cut_prompts(tiny_flux, [long]) is None
    said = cut_prompts(tiny_flux, [long, "a ring"], 10)
    assert said.startswith("1 of 2 prompts are longer than the 10 tokens that ")
    assert said.endswith("it reads 'a red circle and a blue ring and a'")
    assert cut_prompts(tiny_sd3, [f"{long} with a cat"], 10).startswith("1 of 1 prompts are longer than the 16 tokens")


FIRE = "a ring\u2028of fire"


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.txt", f"{FIRE}\r\n{FIRE}"), ("p.jsonl", f'"{FIRE}"\r\n\n"{FIRE}"'), ("p.json", f'["{FIRE}", "{FIRE}"]')],
)
def test_only_newlines_end_a_line_and_json_may_hold_bare_strings(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(str(tmp_path / name)) == [FIRE] * 2


def test_a_set_is_read_by_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_prompts("animals")[:2] == ["cat", "dog"] and len(read_prompts("imagenet_classes")) == 1000
    (tmp_path / "animals").mkdir()
    assert len(read_prompts("animals")) == 45
    (tmp_path / "animals").rmdir()
    (tmp_path / "animals").write_text("my own cat\n")
    assert read_prompts("animals") == ["my own cat"]
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: 'hpdv2:foto' is no prompt set; there are animals"):
        read_prompts("hpdv2:foto", key="evaluation.prompts")
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: cannot read animal: .*\(nor a prompt set: animals, "):
        read_prompts("animal", key="evaluation.prompts")
