"""Energon: what cannot be packed is named and counted, all else is trained, and runs resume."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

import mcore_packing as mp

energon = pytest.importorskip("megatron.energon", reason="needs megatron-energon: data is untested")

from megatron.energon.errors import FatalSampleError  # noqa: E402
from megatron.energon.flavors.webdataset.base_webdataset import BaseWebdatasetFactory  # noqa: E402
from PIL import Image  # noqa: E402

SIZE, TOKENS_PER_TILE, CAPACITY = 8, 4, 64
WORDS = ["<pad>", "<image>", *(f"w{i}" for i in range(90))]
NUM_GOOD = 60
DATASET = """
sample_type:
  __module__: megatron.energon
  __class__: VQASample
field_map:
  image: png
  context: json[question]
  answers: json[answer]
"""
CORRUPT = {
    "broken-image": ("UnidentifiedImageError", "cannot identify image file"),
    "two-placeholders": ("PlaceholderMismatch", "2 placeholders (id -200) but 1 images"),
    "no-placeholder": ("PlaceholderMismatch", "0 placeholders (id -200) but 1 images"),
    "empty-conversation": ("EmptySample", "input_ids are empty"),
    "too-long": ("SampleTooLong", "96 when aligned, but a row has room for 64"),
    "wrong-member": ("FieldAccessError", "Cannot access 'png'"),
    "skipped-by-the-user": ("SkipSample", "not wanted"),
}


def members(key: str) -> dict[str, bytes]:
    """The tar members of a sample, by extension."""
    number = int(key[5:]) if key.startswith("good-") else 3
    buffer = io.BytesIO()
    pixels = np.full((SIZE, SIZE, 3), number % 256, dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    question = {"two-placeholders": "<image> w1 <image>", "no-placeholder": "w1 w2"}
    answer = " ".join(f"w{1 + (number + i) % 80}" for i in range(1 + number % 20))
    text = {"question": question.get(key, "<image> w1"), "answer": answer}
    if key == "empty-conversation":
        text = {"question": "", "answer": ""}
    if key.startswith("too-long"):
        text["answer"] = "w1 " * 90
    image = b"no image at all" if key == "broken-image" else buffer.getvalue()
    name = "flac" if key == "wrong-member" else "png"
    return {name: image, "json": json.dumps(text).encode()}


def webdataset(folder, keys: list[str], num_shards: int = 3):
    """A prepared webdataset of these samples."""
    for shard in range(num_shards):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for key in keys[shard::num_shards]:
                for name, data in members(key).items():
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    BaseWebdatasetFactory.prepare_dataset(
        folder,
        [f"shard-{shard}.tar" for shard in range(num_shards)],
        split_parts_ratio=[("train", 1.0)],
        workers=1,
    )
    (folder / ".nv-meta/dataset.yaml").write_text(DATASET)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Good samples, and every corrupt one among them."""
    keys = [f"good-{number:02}" for number in range(NUM_GOOD)]
    for at, key in enumerate(CORRUPT):
        keys.insert(7 * at + 3, key)
    return webdataset(tmp_path_factory.mktemp("webdataset"), keys)


@pytest.fixture(scope="module")
def long_dataset(tmp_path_factory):
    """200 samples that are too long, and five good ones behind them."""
    keys = [f"too-long-{number:03}" for number in range(200)]
    keys += [f"good-{number:02}" for number in range(5)]
    return webdataset(tmp_path_factory.mktemp("webdataset"), keys, num_shards=1)


def encoder(**options):
    spec = options.pop("spec", mp.RowSpec(seq_multiple=2, img_seq_len=TOKENS_PER_TILE))
    name = options.pop("algorithm", "fullest")

    class Encoder(mp.data.energon.PackingTaskEncoder):
        packer = mp.data.get_packer(name, spec, CAPACITY, **options)

        def make_sample(self, sample) -> dict:
            if sample.__key__ == "skipped-by-the-user":
                raise energon.SkipSample("not wanted")
            words = f"{sample.context} {sample.answers}".split()
            ids = torch.tensor([WORDS.index(word) for word in words], dtype=torch.int64)
            return {"input_ids": ids.masked_fill(ids == 1, -200), "images": sample.image[None]}

    return Encoder()


def loader_of(dataset, log, *, num_workers=0, task_encoder=None, repeat=False, buffer_size=20,
              shuffle_buffer_size=8):  # fmt: skip
    config = energon.WorkerConfig(
        rank=0, world_size=1, num_workers=num_workers, global_error_handler=log
    )
    train = energon.get_train_dataset(
        dataset,
        worker_config=config,
        batch_size=None,
        shuffle_buffer_size=shuffle_buffer_size,
        max_samples_per_sequence=None,
        packing_buffer_size=buffer_size,
        task_encoder=task_encoder or encoder(),
        repeat=repeat,
    )
    return energon.get_savable_loader(train)


def keys_of(rows) -> list[str]:
    return [key for row in rows for key in row.__key__]


GOOD = [f"good-{number:02}" for number in range(NUM_GOOD)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_packed_is_named_and_all_else_is_trained(dataset, num_workers):
    log = mp.data.energon.SkipLog()
    rows = list(loader_of(dataset, log, num_workers=num_workers))
    assert sorted(keys_of(rows)) == GOOD
    found = {one.key.split("/")[-1]: one for one in log.skipped}
    assert len(log.skipped) == len(CORRUPT) and set(found) == set(CORRUPT)
    for key, (cause, reason) in CORRUPT.items():
        assert found[key].cause == cause and reason in found[key].reason, found[key]
        assert f"  {found[key]}" in str(log)
    assert log.causes == Counter(cause for cause, _ in CORRUPT.values())
    assert str(log).startswith("skipped 7 samples: 2 PlaceholderMismatch")


def test_what_is_too_long_is_cut_where_that_is_asked_for(long_dataset, caplog):
    log = mp.data.energon.SkipLog()
    make = encoder(on_too_long="truncate")
    rows = list(loader_of(long_dataset, log, task_encoder=make))
    assert len(keys_of(rows)) == 205 and not log.skipped
    assert all(row.layout.num_expanded <= CAPACITY for row in rows)
    cut = [message for message in caplog.messages if message.startswith("cut sample too-long-")]
    assert len(cut) == 200 and "31 tokens, 31 of them trained, and 0 images are gone" in cut[0]


def test_a_row_has_what_the_model_takes_and_both_spaces(dataset):
    rows = list(loader_of(dataset, mp.data.energon.SkipLog()))
    for row in rows:
        assert isinstance(row, mp.data.Row) and row.packed_seq_params.layout is row.layout
        assert len(row.indices) == len(row.__key__) == row.layout.num_seqs
        assert row.layout.num_expanded <= CAPACITY
        tokens = row.layout.cu_seqlens_collapsed.diff()
        assert torch.equal(row.layout.cu_seqlens_expanded.diff(), tokens + TOKENS_PER_TILE - 1)
        assert row.to(dtype=torch.bfloat16).__key__ == row.__key__
        for key, sample in zip(row.__key__, mp.data.split(row), strict=True):
            number = int(key[5:])
            assert sample["__key__"] == key
            assert sample["input_ids"].numel() == 3 + number % 20
            assert torch.equal(sample["images"], torch.full((1, 3, SIZE, SIZE), number / 255))


def test_rows_are_shuffled_and_the_same_whenever(dataset):
    def lengths(**options):
        log = mp.data.energon.SkipLog()
        loader = loader_of(dataset, log, task_encoder=encoder(**options), buffer_size=100)
        return [row.layout.max_seqlen for row in loader]

    found = lengths(algorithm="first_fit_decreasing")
    assert found == lengths(algorithm="first_fit_decreasing")
    assert found != sorted(found, reverse=True)
    assert found != lengths(algorithm="first_fit_decreasing", seed=1)


def test_an_error_stops_the_run_where_that_is_asked_for(dataset, tmp_path):
    log = mp.data.energon.SkipLog(tmp_path / "skipped.jsonl", raises=True)
    assert log.skipped == [] and str(log) == "skipped 0 samples"
    with pytest.raises(mp.PackingError, match=r"skipped sample [a-z-]+: [A-Z]"):
        list(loader_of(dataset, log))
    assert len(log.skipped) == 1 and log.skipped[0].key in CORRUPT


def test_selection_never_raises(dataset):
    """A sample that only shows in the buffer that it is wrong costs itself."""
    make = encoder()
    good = type(make).make_sample

    def make_sample(sample):
        made = good(make, sample)
        if sample.__key__ == "good-30":
            made["images"] = made["images"][..., :4]
        return made

    make.make_sample = make_sample
    log = mp.data.energon.SkipLog()
    rows = list(loader_of(dataset, log, task_encoder=make))
    assert sorted([*keys_of(rows), "good-30"]) == GOOD
    (found,) = [one for one in log.skipped if one.key == "good-30"]
    assert found.cause == "PackingError" and "rows hold those of one kind" in found.reason


def test_a_row_that_cannot_be_joined_names_all_its_samples(dataset):
    broken = encoder()
    join = broken.packer.join

    def fail_once(samples):
        if "good-30" in [sample["__key__"] for sample in samples]:
            raise mp.PackingError("no")
        return join(samples)

    object.__setattr__(broken.packer, "join", fail_once)
    log = mp.data.energon.SkipLog()
    rows = list(loader_of(dataset, log, task_encoder=broken))
    lost = [one.key for one in log.skipped if one.reason == "no"]
    assert "good-30" in lost and sorted(keys_of(rows) + lost) == GOOD


def test_many_refused_samples_in_a_row_end_no_job(long_dataset):
    """Energon's own limit is 100; ours can be set."""
    log, options = mp.data.energon.SkipLog(), {"buffer_size": 10, "shuffle_buffer_size": None}
    rows = list(loader_of(long_dataset, log, **options))
    assert sorted(keys_of(rows)) == GOOD[:5]
    assert len(log.skipped) == 200 and log.causes == {"SampleTooLong": 200}
    strict = encoder()
    strict.max_refused_in_a_row = 150
    with pytest.raises(FatalSampleError, match="failed 150 times in a row"):
        list(loader_of(long_dataset, mp.data.energon.SkipLog(), task_encoder=strict, **options))


def test_a_missing_setting_ends_the_job(dataset):
    """It would skip every sample with an image."""
    without = encoder(spec=mp.RowSpec())
    with pytest.raises(FatalSampleError, match=r"need spec\.img_seq_len"):
        list(loader_of(dataset, mp.data.energon.SkipLog(), task_encoder=without))


def test_half_a_line_is_what_a_killed_worker_leaves(tmp_path):
    path = tmp_path / "skipped.jsonl"
    log = mp.data.energon.SkipLog(path)
    log(ValueError("what"), {"__key__": "a"})
    for half in ('["b", "Value', '["c"]', "7"):
        path.write_text(path.read_text() + half + "\n")
    assert log.causes == {"ValueError": 1, "HalfALine": 3}
    assert str(log).startswith("skipped 4 samples: 3 HalfALine, 1 ValueError")
    assert log.skipped[0].key == "a" and log.skipped[1].reason == '["b", "Value'


def test_a_long_log_is_short_in_print():
    log = mp.data.energon.SkipLog()
    log(ValueError(), [{"__key__": f"key-{i}"} for i in range(30)])
    log(ValueError("what"), object())
    assert len(str(log).splitlines()) == 12 and "and 21 more" in str(log)
    assert log.skipped[0].reason == "ValueError()" and log.skipped[-1].key == "unknown"


@pytest.mark.parametrize("steps, num_workers", [(0, 0), (1, 0), (5, 0), (23, 0), (7, 2)])
def test_a_run_resumes_in_mid_epoch(dataset, tmp_path, steps, num_workers):
    loader = loader_of(dataset, mp.data.energon.SkipLog(), repeat=True, num_workers=num_workers)
    rows = iter(loader)
    seen = [next(rows) for _ in range(steps)]
    torch.save(loader.save_state_rank(), tmp_path / "state.pt")
    expected = [next(rows) for _ in range(30)]

    resumed = loader_of(dataset, mp.data.energon.SkipLog(), repeat=True, num_workers=num_workers)
    with mp.data.energon.safe_globals():
        state = torch.load(tmp_path / "state.pt")
    mp.data.energon.restore_state(resumed, state)
    rows = iter(resumed)
    found = [next(rows) for _ in range(30)]
    for here, there in zip(expected, found, strict=True):
        assert here.__key__ == there.__key__
        assert torch.equal(here.input_ids, there.input_ids)
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.layout.to_tensor(), there.layout.to_tensor())
    assert len(set(keys_of(seen + found))) == NUM_GOOD  # two epochs and more
