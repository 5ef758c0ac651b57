"""The lines of the guides, applied to Megatron's real files and run."""

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.multimodal.llava_model import LLaVAModel

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.testing import tiny
from mcore_packing.testing.megatron_example import Case, Example
from mcore_packing.testing.sources import CHECKOUT, MEGATRON

from . import processes
from .laws import IS_FULL
from .models import POSITIONS, SIZE, model_of

pytestmark = pytest.mark.usefixtures("megatron")
GUIDE = (CHECKOUT / "docs/megatron-lm.md").read_text()
VERSIONS = "0.17.1", "0.18.2", "0.19.0", "main"


def applied(version: str, name: str) -> str:
    """A file of Megatron's example with the guide's lines in it."""
    if not MEGATRON.has(version):
        pytest.skip(f"no sources of Megatron-Core {version}. {MEGATRON.how}")
    text = (MEGATRON.unpacked(version) / "examples/multimodal" / name).read_text()
    changes = re.findall(rf"```diff {re.escape(name)}\n(.*?)```", GUIDE, re.S)
    assert changes
    for change in changes:
        lines = change.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line.startswith("-"))
        after = "".join(f"{line[1:]}\n" for line in lines if line.startswith("+"))
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


@pytest.mark.parametrize("version", VERSIONS)
def test_the_model_provider_installs_the_hook(version):
    text = applied(version, "model.py")
    assert compile(text, "model.py", "exec")
    body = re.search(r"    import mcore_packing as mp\n.*?    return model\n", text, re.S).group(0)
    namespace = {}
    exec(f"def provide(model):\n{body}", namespace)
    model = namespace["provide"](model_of())
    assert isinstance(model, LLaVAModel) and model._packing_hook.plan.space == "expanded"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cp, sp", [(1, False), (2, False), (2, True)], ids=["", "cp", "cp-sp"])
def test_packed_rows_keep_their_boundaries_and_equal_one_by_one(version, cp, sp, tmp_path):
    train = tmp_path / "train.py"
    train.write_text(applied(version, "train.py"))
    example = Example(version, train)
    case = Case("expanded", 2, cp, sp, None, 0, False, "uncut")
    model = model_of("rope").eval()
    for seed in range(3 if IS_FULL else 1):
        samples, data = example.data(case, random.Random(seed))
        row = example.batch(data)
        tokens, labels, loss_mask, _, position_ids, images, num_tiles, params = row
        assert torch.equal(params.cu_seqlens_q, data["cu_lengths"][0])
        alone = [
            {"input_ids": s.tokens, "images": torch.stack(s.imgs) if s.imgs else None,
             "num_image_tiles": s.num_tiles}
            for s in samples
        ]  # fmt: skip
        expected = parity.run_alone(model, alone)
        num_tiles = num_tiles[0] if num_tiles.dim() == 2 else num_tiles
        with mp.install(model, space="expanded"), torch.no_grad():
            loss, mask = model(images, tokens, position_ids, None, labels, loss_mask,
                               num_image_tiles=num_tiles, packed_seq_params=params)  # fmt: skip
        start = 0
        for (logprobs, trained), sample in zip(expected, samples, strict=True):
            end = start + sample.total_len
            both = mask[0, start:end] * trained
            both[-1] = 0  # the example's shift goes on into the next sample
            assert both.any() or len(sample.tokens) < 3
            assert ((loss[0, start:end] + logprobs) * both).abs().max() < 1e-5
            start = end


@pytest.mark.parametrize("version", VERSIONS)
def test_every_stage_reads_the_data(version):
    text = applied(version, "dataloader_provider.py")
    source = re.search(r"def is_first_or_last_stage.*?return is_valid_rank\n", text, re.S).group(0)
    for stage in range(4):
        namespace = {"get_pipeline_model_parallel_rank": lambda stage=stage: stage}
        exec(source, namespace)
        assert namespace["is_first_or_last_stage"](4)


def test_a_middle_stage_with_tokens_moves_its_boundaries():
    model = model_of("rope", max_sequence_length=512)
    stage = model_of(
        "rope", pre_process=False, post_process=False, add_encoder=False, max_sequence_length=512
    )
    seen = {}

    def see(name):
        def hook(module, args, kwargs):
            seen[name] = kwargs["packed_seq_params"]

        return hook

    for name, chunk in (("first", model), ("middle", stage)):
        chunk._language_is_pipeline_parallel = True
        chunk.language_model.register_forward_pre_hook(see(name), with_kwargs=True)
    row = parity.collate(tiny.samples(4, img_size=SIZE))
    stage.set_input_tensor(torch.randn(512, 1, 64))
    with mp.install([model, stage], space="collapsed"), torch.no_grad():
        parity.forward(model, row)
        parity.forward(stage, row)
    assert torch.equal(seen["middle"].cu_seqlens_q, seen["first"].cu_seqlens_q)
    assert seen["middle"].max_seqlen_q == seen["first"].max_seqlen_q


def blocks_of(name: str) -> list[str]:
    """The Python of a page, as it stands there, but on this machine's CPU."""
    text = (CHECKOUT / name).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    return [block.replace('"cuda", torch.bfloat16', '"cpu"') for block in blocks]


def namespace_of(model) -> dict:
    samples = tiny.samples(4, img_size=SIZE)
    return {
        "mp": mp,
        "torch": torch,
        "model": model,
        "samples": samples,
        "get_model": lambda provider: [model],
        "model_provider": None,
    }


def test_the_lines_of_the_readme():
    model = model_of("rope", max_sequence_length=1024)
    namespace = namespace_of(model)
    for block in blocks_of("README.md"):
        exec(block, namespace)
    alone = parity.run_alone(model, namespace["samples"])
    expected = torch.cat([alone[i][0] for i in namespace["rows"][0].indices])
    difference = (namespace["loss"][0] + expected) * namespace["loss_mask"][0]
    assert difference.abs().max() < 1e-5 and namespace["loss_mask"].sum() > 100


@pytest.mark.parametrize("positions", POSITIONS)
def test_rows_of_pack_are_right_without_the_hook_on_one_rank(positions):
    model = model_of(positions, max_sequence_length=1024)
    rows, _ = mp.data.pack(tiny.samples(4, img_size=SIZE), mp.row_spec(model))
    assert mp.parity.isolation(model, rows[0]).is_right
    assert mp.parity.verify(model, rows[0]).is_right


def test_the_first_row():
    said = processes.run(CHECKOUT / "examples/first_row.py", processes=1)
    assert "6 of 6 samples in 1 rows" in said
    assert "packed against one by one: right, token_mult_prob_error 1.000000" in said


def test_the_rows_of_qwen():
    pytest.importorskip("transformers")
    said = processes.run(CHECKOUT / "examples/qwen_rows.py", processes=1)
    differences = re.findall(r"sample \d: differs by at most (\S+)", said)
    assert len(differences) == 6 and all(float(one) < 1e-5 for one in differences)
    assert "6 of 6 samples in 1 rows" in said


def test_no_page_has_a_gap():
    pages = [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md")]
    assert len(pages) > 10
    for page in pages:
        text = page.read_text()
        assert not re.search(r"^[A-Z]+_(TABLE|SECTION)$|TODO", text, re.M), page
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), (page, target)


def test_the_lines_on_pipelines():
    block, shared = blocks_of("docs/parallelism.md")
    send, receive = block.split("...\n")
    model = model_of("rope")
    row = parity.collate(tiny.samples(4, img_size=SIZE))
    namespace = namespace_of(model) | {
        "tokens": row["input_ids"],
        "cu_seqlens": row["cu_seqlens"],
        "num_image_tiles": row["num_image_tiles"],
        "img_seq_len": model.img_seq_len,
    }
    with mp.install(model, space="collapsed"):
        exec(send, namespace)
        exec(receive, namespace)
    params = namespace["packed_seq_params"]
    assert params.layout.num_seqs == 4 and not params.layout.has_tokens
    assert params.max_seqlen_q == namespace["layout"].max_seqlen
    namespace["parallel_state"] = parallel_state
    exec(shared, namespace)
    loss, _ = model(**namespace["rows"][0].inputs())
    assert loss.shape == (1, namespace["rows"][0].layout.num_expanded)


def test_the_lines_on_a_model_on_a_cpu(capsys):
    (block,) = blocks_of("docs/your-model.md")
    given = []

    def build_model(spec):
        given.append(spec.submodules.self_attention.submodules.core_attention)
        return model_of("rope")

    exec(block, {"build_model": build_model, "samples": tiny.samples(4, img_size=SIZE)})
    assert given == [mp.attention.PackedAttention]
    isolated, verified = capsys.readouterr().out.splitlines()
    assert isolated.startswith("isolation: right") and "by one: right" in verified


def own_data(folder: Path, *options: str, **how) -> list[dict]:
    """What the example for a model of one's own logs."""
    script = CHECKOUT / "examples/own_data.py"
    options = (*options, "--epochs", "1", "--output", str(folder))
    printed = processes.run(script, *options, timeout=600, **how)
    assert "isolation: right, bit by bit" in printed
    assert "packed against one by one: right, token_mult_prob_error 1.000000" in printed
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_own_data_goes_on_in_the_middle_of_an_epoch(tmp_path):
    fake = "def init(**kwargs): return Run()\nclass Run:\n    def log(self, numbers, step):\n"
    fake += f"        print(numbers, file=open({str(tmp_path / 'wandb.txt')!r}, 'a'))\n"
    (tmp_path / "wandb.py").write_text(fake)
    path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
    entries = own_data(tmp_path, processes=1, env={**os.environ, "PYTHONPATH": path})
    report, isolated, verified, *trained, held_out = entries
    assert report["num_samples"] == 1000 and not report["refused"]
    assert (isolated["verdict"], verified["verdict"]) == ("right", "right")
    losses = [entry["loss"] for entry in trained]
    assert len(losses) == 26 and losses[-1] < losses[0] / 2 and held_out["held_out_loss"] < 1
    logged = (tmp_path / "wandb.txt").read_text()
    assert "'fill': 0.9" in logged and f"{{'loss': {losses[-1]!r}}}" in logged
    again = own_data(tmp_path, "--resume", processes=1)[len(entries) + 3 :]
    assert [entry["step"] for entry in again[:-1]] == [21, 22, 23, 24, 25, 26]
    assert [entry["loss"] for entry in again[:-1]] == losses[20:]  # to the last bit
    assert again[-1] == held_out


@pytest.mark.parametrize(
    "options", [("--cp", "2"), pytest.param((), marks=pytest.mark.slow)], ids=["cp2", "dp2"]
)
def test_own_data_on_ranks(options, tmp_path):
    _, _, _, first, *_, last, _ = own_data(tmp_path, *options, processes=2)
    assert last["loss"] < first["loss"] / 2
