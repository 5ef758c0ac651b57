"""Video rows, markers in the text, and what else was silently wrong once: each mended for good."""

import random

import numpy as np
import pytest
import torch

from mcore_packing import AmbiguousTruncation, PackingError
from mcore_packing.media import (
    Family,
    get_family,
    place_image_blocks,
    reconcile,
    register_family,
    split_samples,
    take_samples,
    truncate,
)

TEXT, START, IMAGE, END, VIDEO, STAMP, BREAK = 1, 7, 9, 8, 5, 50, 12
MARKERS = {"vision_start_id": START, "vision_end_id": END}
BY_ID = {"video_token_id": VIDEO, "tokens_per_video": [[2, 2]], **MARKERS}
# As Qwen3-VL writes it: start, timestamp, start, pads, end, timestamp, start, pads, end, end.
FRAMES = [STAMP, START, VIDEO, VIDEO, END, STAMP + 1, START, VIDEO, VIDEO, END]
CLIP = [START, *FRAMES, END]
PICTURE = [START, IMAGE, IMAGE, END]


def test_an_uncut_video_row_stays_whole():
    row = [TEXT, *CLIP, TEXT, *PICTURE, TEXT]
    for cut in (
        truncate(row, [2], len(row), IMAGE, **BY_ID),
        truncate(row, [2], 999, IMAGE, side="left", **BY_ID),
        reconcile(row, [2], IMAGE, **BY_ID),
    ):
        assert cut.noop and cut.output_ids == row
        assert (cut.kept_images, cut.kept_videos) == ([0], [0])


def test_a_marker_in_the_text_stays():
    """It marks nothing that was removed; the one of the image that the cut went through goes."""
    row = [TEXT, START, TEXT, END, TEXT, *PICTURE, START, TEXT, *PICTURE]
    assert truncate(row, [2, 2], len(row), IMAGE, **MARKERS).output_ids == row
    cut = truncate(row, [2, 2], len(row) - 2, IMAGE, **MARKERS)
    assert cut.output_ids == row[: -len(PICTURE)]
    assert reconcile(row[:-2], [2, 2], IMAGE, **MARKERS).output_ids == row[: -len(PICTURE)]
    left = truncate(row, [2, 2], 8, IMAGE, side="left", **MARKERS)
    assert left.output_ids == [START, TEXT, *PICTURE]


def test_videos_that_nobody_named_are_refused():
    row = [TEXT, *PICTURE, START, VIDEO, VIDEO, VIDEO, END, TEXT]
    for call in (
        lambda: truncate(row, [2], 99, IMAGE, **MARKERS),
        lambda: reconcile(row, [2], IMAGE, **MARKERS),
    ):
        with pytest.raises(PackingError, match="position 5: markers stand around 3 tokens of id 5"):
            call()
    for options in ({"video_token_id": VIDEO, **MARKERS}, {"family": mine()}):
        with pytest.raises(PackingError, match=r"3 video placeholders .* adds up to 0"):
            truncate(row, [2], 99, None if "family" in options else IMAGE, **options)


def mine(**attributes):
    known = {"image_token_id": IMAGE, "video_token_id": VIDEO, **MARKERS}
    return Family("mine", **known, **attributes)


@pytest.mark.parametrize("by_family", [False, True], ids=["ids", "family"])
def test_a_cut_video_takes_its_timestamps_along(by_family):
    row = [TEXT, *CLIP, TEXT + 1]
    if by_family:
        family = mine(video_start_id=START, video_end_id=END)
        options = {"family": family, "tokens_per_video": [[2, 2]]}
    else:
        options = {"image_token_id": IMAGE, **BY_ID}
    for length in range(1, 10):
        assert truncate(row, [], length, **options).output_ids == [TEXT], length
    for length in range(1, 10):
        cut = truncate(row, [], length, side="left", **options)
        assert cut.output_ids == [TEXT + 1], length
    # Somebody else's cuts: with placeholders left the row says it; the header alone only a family.
    for length in range(4 if not by_family else 2, 10):
        if row[length - 1] != START or length > 2:
            found = reconcile(row[:length], [], side="right", **options)
            assert found.output_ids == [TEXT], length
    for start in range(5, 13):
        found = reconcile(row[start:], [], side="left", **options)
        assert found.output_ids == [TEXT + 1], start


def test_an_image_between_two_frames_of_a_lost_video_stays():
    """The text between frames is a label of the video; a whole image there is not."""
    row = [TEXT, START, VIDEO, VIDEO, END, STAMP, *PICTURE, START, VIDEO, VIDEO, END]
    cut = truncate(row, [2], len(row) - 2, family=mine(), tokens_per_video=[[2, 2]])
    assert cut.output_ids == [TEXT, *PICTURE] and cut.kept_images == [0]
    found = reconcile(row[:-2], [2], family=mine(), tokens_per_video=[[2, 2]], side="right")
    assert found.output_ids == [TEXT, *PICTURE] and found.kept_images == [0]


def test_images_and_videos_in_one_prompt():
    family = get_family("qwen3_vl")
    image, video = family.image_token_id, family.video_token_id
    begin, end = family.vision_start_id, family.vision_end_id
    prompt = [*family.turn_opener, begin, video, end, 40, begin, image, end, 41]
    frames = [60, begin, video, video, end, 61, begin, video, video, end]
    for clip in (frames, [begin, *frames, end]):
        placed = place_image_blocks(
            prompt, [clip, [begin, image, image, end]], family=family, labels=prompt
        )
        row = [*family.turn_opener, begin, *frames, end, 40, begin, image, image, end, 41]
        assert placed.output_ids == row
        types = [2 * (token == video) + (token == image) for token in row]
        assert placed.mm_token_type_ids == types and 2 in types and 1 in types
        trained = [token for token in placed.labels if token != -100]
        assert trained[-2:] == [end, 41] or trained[-1] == 41
    with pytest.raises(PackingError, match=r"holds an image .* but the prompt has a video there"):
        place_image_blocks(prompt, [[begin, image, end], clip], family=family)
    cut = truncate(row, [2], len(row), family=family, tokens_per_video=[[2, 2]])
    assert cut.noop


def test_a_video_written_with_the_images_placeholder():
    """GLM: another token stands for it in the prompt, and its type is 2."""
    family = get_family("glm4_5v")
    pad, begin, end = family.image_token_id, family.vision_start_id, family.vision_end_id
    prompt = [family.video_start_id, family.video_prompt_token_id, family.video_end_id, 4, pad]
    placed = place_image_blocks(
        prompt, [[begin, pad, pad, end, 9], [begin, pad, end]], family="glm4_5v"
    )
    row = [family.video_start_id, begin, pad, pad, end, 9, family.video_end_id, 4, begin, pad, end]
    assert placed.output_ids == row
    assert placed.mm_token_type_ids == [0, 0, 2, 2, 0, 0, 0, 0, 0, 1, 0]


def test_no_block_goes_after_bos():
    prompt = [248045, 846, 198, 40, 248046]
    block = [[248053, 248056, 248054]]
    with pytest.raises(PackingError, match="turn opener does not occur"):
        place_image_blocks(prompt, block, family="qwen3_vl", image_token_id=248056)
    placed = place_image_blocks(prompt, block, family="qwen3_5")
    assert placed.output_ids == [*prompt[:3], *block[0], *prompt[3:]]
    with pytest.raises(PackingError, match=r"no turn opener is known .'<SPECIAL_11>User\\n' as"):
        place_image_blocks([1, 2], [[131072]], family="nemotron_nano_vl_v2")
    assert place_image_blocks([1, 2], [], family="nemotron_nano_vl_v2").output_ids == [1, 2]


def test_breaks_of_an_image_that_is_gone_go_too():
    image = [IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END]
    row, options = [*image, TEXT, *image], {"break_token_ids": [BREAK], "vision_end_id": END}
    for drop in (True, False):
        left = reconcile([BREAK, END, TEXT, *image], [2, 4], IMAGE, drop_dangling=drop, **options)
        assert left.output_ids == [*[END][drop:], TEXT, *image]
        assert left.orphan_positions == [0] and left.kept_images == [1]
    family = get_family("llama4")
    pad, start = family.image_token_id, family.vision_start_id
    two = [40, start, *family.break_token_ids[2:], pad, pad, family.vision_end_id, 41]
    assert truncate(two, [2], len(two), family="llama4").output_ids == two
    for length in range(1, 5):
        assert truncate(two, [2], length, family="llama4").output_ids == [40], length
        assert reconcile(two[:length], [2], family="llama4", side="right").output_ids == [40]
    assert truncate(row, [4, 4], 99, IMAGE, **options).noop


def test_a_marker_of_three_tokens_goes_whole():
    """Kimi writes media begin, the word image, media content."""
    family = get_family("kimi_k2_5")
    pad, (middle,) = family.image_token_id, family.break_token_ids
    row = [40, family.vision_start_id, 4017, middle, pad, pad, family.vision_end_id, 41]
    assert truncate(row, [2], 99, family=family).noop
    for length in range(1, 6):
        assert truncate(row, [2], length, family=family).output_ids == [40]
        assert reconcile(row[:length], [2], family=family, side="right").output_ids == [40]
    for length in range(1, 4):
        cut = truncate(row, [2], length, side="left", family=family)
        assert cut.output_ids == [41]


def mrope(kinds, grids):
    """Qwen's positions: text counts on, an image spans its grid and then its longer side."""
    grids, positions, at, p = iter(grids), [], 0, 0
    while p < len(kinds):
        if not kinds[p]:
            positions.append((at, at, at))
            at, p = at + 1, p + 1
            continue
        height, width = next(grids)
        positions += [(at, at + h, at + w) for h in range(height) for w in range(width)]
        at, p = at + max(height, width), p + height * width
    return torch.tensor(positions, dtype=torch.int64).reshape(-1, 3).T


def test_positions_of_m_rope_close_up():
    """What is left has the positions that it would have had without what was removed."""
    row = [TEXT, START, *[IMAGE] * 6, END, TEXT, START, *[IMAGE] * 4, END, TEXT, TEXT]
    types, grids = [int(token == IMAGE) for token in row], [(2, 3), (4, 1)]
    positions = mrope(types, grids)
    for length in range(1, len(row) + 1):
        for side in ("left", "right"):
            cut = truncate(row, [6, 4], length, IMAGE, side=side, **MARKERS)
            kept = [grids[image] for image in cut.kept_images]
            expected = mrope([int(token == IMAGE) for token in cut.output_ids], kept)
            for given in (positions, positions[:, None], positions.numpy()):
                dim = given.ndim - 1
                found = cut.apply(given, per="position", dim=dim)
                assert np.array_equal(np.asarray(found).reshape(3, -1), expected)
                by_name = cut.apply({"position_ids": given, "labels": None}, dim=dim)
                assert np.array_equal(by_name["position_ids"], found)
            if not torch.equal(positions[:, cut.keep_positions], expected):
                with pytest.raises(PackingError, match=r'look like position ids .* per="position"'):
                    cut.apply(positions, dim=1)
    cut = truncate(row, [6, 4], len(row) - 4, IMAGE, side="left", **MARKERS)
    assert cut.apply({"position_ids": list(range(len(row)))})["position_ids"] == cut.position_ids
    packed = truncate(
        row + row, [6, 4] * 2, [len(row), len(row) - 4], IMAGE, side="left",
        cu_seqlens=[0, len(row), 2 * len(row)], **MARKERS,
    )  # fmt: skip
    both = torch.cat([positions, positions], dim=1)
    alone = cut.apply(positions, per="position", dim=1)
    assert torch.equal(
        packed.apply(both, per="position", dim=1), torch.cat([positions, alone], dim=1)
    )


@pytest.mark.parametrize(
    "flag", [1, "false", np.array([True, False]), torch.tensor([1, 0])], ids=str
)
def test_what_is_no_flag_is_refused(flag):
    with pytest.raises(PackingError, match="drop_dangling is"):
        truncate([1], [], 1, IMAGE, drop_dangling=flag)
    with pytest.raises(PackingError, match="shifted is"):
        place_image_blocks([1], [], [1], labels=[2], shifted=flag)
    for values in ([2], {"labels": [2]}):
        with pytest.raises(PackingError, match="shifted is"):
            truncate([1], [], 1, IMAGE).apply(values, shifted=flag)
    with pytest.raises(PackingError, match="overwrite is"):
        register_family("qwen2_vl", overwrite=flag)


@pytest.mark.parametrize("grid", [5, torch.tensor(5), np.array(5), "thw"], ids=repr)
def test_what_is_no_grid_is_refused(grid):
    batch = {"pixel_values": [1] * 4, "image_grid_thw": grid}
    for call, last in ((split_samples, 1), (take_samples, [0])):
        with pytest.raises(PackingError, match="image_grid_thw"):
            call(batch, "qwen2_vl", [1], last)


def test_every_function_takes_a_family():
    batch = {"input_ids": [[1], [2]], "pixel_values": ["a"]}
    for family in ("llava15", get_family("llava15")):
        assert split_samples(batch, family, [1, 0], 1)[0]["pixel_values"] == ["a"]
        assert take_samples(batch, None, [1, 0], [0], family=family)["pixel_values"] == ["a"]
    with pytest.raises(PackingError, match="vision_stop_id is no argument"):
        truncate([1], [], 1, IMAGE, vision_stop_id=3)


def written(draw, name):
    """A row as the processor of a family writes it, and which image or video each token is of."""
    one = get_family(name)
    begin, end = one.vision_start_id, one.vision_end_id
    ids, owners, types, counts = [], [], [], ([], [])

    def add(tokens, owner=None, kind=0):
        ids.extend(tokens)
        owners.extend([owner] * len(tokens))
        types.extend([kind] * len(tokens))

    for _ in range(draw.randint(0, 4)):
        add([TEXT] * draw.randint(0, 2))
        video = name != "pixtral" and draw.random() < 0.5
        owner, runs = (video, len(counts[video])), [draw.randint(1, 3) for _ in range(3)]
        runs = runs[: draw.randint(1, 3)]
        pad = one.video_token_id if video and one.video_token_id else one.image_token_id
        if name == "pixtral":
            for run in runs[:-1]:
                add([pad] * run, owner, 1)
                add(one.break_token_ids, owner)
            add([pad] * runs[-1], owner, 1)
            add([end], owner)
            counts[0].append(sum(runs))
            continue
        runs = runs if video else runs[:1]
        add([] if one.video_start_id is None or not video else [one.video_start_id], owner)
        for frame, run in enumerate(runs):
            label = owner if frame or one.video_start_id is not None else None
            add([STAMP] * video, label)
            marker = [begin, STAMP, *one.break_token_ids] if one.break_token_ids else [begin]
            add(marker, owner)
            add([pad] * run, owner, 1 + video)
            add([end], owner)
        add([] if one.video_end_id is None or not video else [one.video_end_id], owner)
        counts[video].append(runs if len(runs) > 1 else runs[0])
    add([TEXT] * draw.randint(0, 2))
    return ids, owners, types, counts


FAMILIES_OF_ROWS = (
    "qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma4", "kimi_k2_5", "internvl3", "pixtral",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES_OF_ROWS)
def test_nothing_of_a_lost_image_is_left_in_the_row(name):
    """No marker, break or placeholder of one, and no label where a marker or a side tells it."""
    draw, one = random.Random(name), get_family(name)
    labels = one.video_token_id is None or one.video_start_id is not None or name == "kimi_k2_5"
    checked = {"truncate": 0, "left": 0, "right": 0, None: 0}
    for _ in range(400):
        ids, owners, types, (images, videos) = written(draw, name)
        start = draw.randint(0, len(ids))
        stop = draw.randint(start, len(ids))
        side = draw.choice(list(checked))
        start = 0 if side in ("right", "truncate") else start
        stop = len(ids) if side == "left" else stop
        given = {"family": name, "tokens_per_video": videos}
        if one.video_token_id is None:
            given["mm_token_type_ids"] = types if side == "truncate" else types[start:stop]
        try:
            if side == "truncate":
                cut = truncate(ids, images, stop, **given)
            else:
                cut = reconcile(ids[start:stop], images, side=side, **given)
        except AmbiguousTruncation:
            assert side is None
            continue
        whole = {
            owner
            for owner in set(owners) - {None}
            if all(start <= p < stop for p, o in enumerate(owners) if o == owner and types[p])
        }
        expected = [p for p in range(start, stop) if owners[p] is None or owners[p] in whole]
        left = [p + start * (side != "truncate") for p in cut.keep_positions]
        assert set(expected) <= set(left)
        assert all(ids[p] == STAMP for p in set(left) - set(expected)), (side, ids[start:stop])
        if labels and side == "truncate":
            assert left == expected
        checked[side] += 1
    assert min(checked.values()) > 40


def test_text_is_never_removed_on_a_guess():
    """Without a side several windows fit: what belongs to a video is only known by its markers."""
    text = [*range(60, 90)]
    outer = {"video_start_id": START, "video_end_id": END}
    for row, videos in (
        ([*text, START, VIDEO, VIDEO], [[4, 4]]),
        ([VIDEO, VIDEO, END, *text], [[4, 4]]),
        ([VIDEO, VIDEO, END, *text, START, VIDEO, VIDEO], [[4, 4], [4, 4]]),
    ):
        cut = reconcile(row, [], family=mine(**outer), tokens_per_video=videos)
        assert cut.output_ids == text and cut.kept_videos == []
    glm = get_family("glm4_5v")
    row = [glm.image_token_id, glm.image_token_id, glm.vision_end_id, *text]
    assert reconcile(row, [[4, 4], 4], family=glm).output_ids == text


def test_labels_of_a_shifted_family_and_tokens_beside_them():
    """Only what is about the next token becomes -100 where that was removed."""
    ids = [61, 62, START, IMAGE, IMAGE, IMAGE, END, 4, 4]
    labels = [*ids[1:], 0]
    cut = truncate(ids, [3], 5, family=mine(shifted=True))
    assert cut.apply({"labels": labels}) == {"labels": [62, -100]}
    assert cut.apply({"labels": ids}, shifted=False) == {"labels": [61, 62]}
    cut = truncate(ids, [3], 5, family=mine())
    batch = {"tokens": ids, "input_ids": ids, "labels": labels, "mm_token_type_ids": [0] * 9}
    batch |= {"token_type_ids": [7] * 9, "moe_mm_token_type_ids": [7] * 9}
    batch |= {"attention_mask": [1] * 9, "advantages": [0.5] * 9}
    found = cut.apply(batch, shifted=True, fill=0)
    changed = {name for name, values in found.items() if values != cut.apply(batch[name])}
    assert changed == {"labels", "advantages"} and found["tokens"] == cut.output_ids == [61, 62]
    for mask in (torch.ones(9, 9), torch.ones(1, 1, 9, 9)):  # it would be cut on one side only
        with pytest.raises(PackingError, match=r"attention_mask is \[T, T\]"):
            cut.apply({"attention_mask": mask})
    for unused in ({"layout": {}}, {"turn_opener": [5]}, {"count": "gemma4"}):
        with pytest.raises(PackingError, match="no attribute that is used here"):
            truncate([1], [], 1, IMAGE, **unused)
    with pytest.raises(PackingError, match="drop_dangling is no argument"):
        place_image_blocks([1], [], [1], drop_dangling=True)


def test_counts_of_one_row_may_have_a_batch_dimension():
    """Read as nested lists they would be one image of two runs."""
    row = [1, START, IMAGE, IMAGE, END, 2, START, IMAGE, IMAGE, IMAGE, END, 3]
    for counts in (torch.tensor([[2, 3]]), np.array([[2, 3]]), torch.tensor([2, 3])):
        cut = truncate(row, counts, 9, IMAGE, **MARKERS)
        assert cut.kept_images == [0] and cut.output_ids == row[:6]
    with pytest.raises(PackingError, match=r"tokens_per_image is \[2, 1\]"):
        truncate(row, torch.tensor([[2], [3]]), 9, IMAGE, **MARKERS)


def test_positions_of_the_text_beside_those_of_m_rope():
    """Transformers writes [4, B, T]: each of the two closes up and restarts by itself."""
    row = [1, START, *[IMAGE] * 4, END, 3, 4]
    three = mrope([int(token == IMAGE) for token in row], [(2, 2)])
    one = torch.cat([torch.arange(len(row))[None], three])
    both = torch.cat([one, one + torch.tensor([[len(row)], [7], [7], [7]])], dim=1)[:, None]
    cut = truncate(torch.tensor([row + row]), [4, 4], 13, IMAGE, side="left", **MARKERS)
    assert cut.kept_images == [1] and len(cut.keep_positions) == 11
    for given in (both, both.numpy()):
        found = np.asarray(cut.apply(given, per="position", dim=-1))[:, 0]
        assert found[0].tolist() == [*range(11)]
        assert found[1:, 2:].tolist() == (three + 2).tolist()
        with pytest.raises(PackingError, match="look like position ids"):
            cut.apply(given, dim=-1)


def test_types_at_markers_are_refused_by_name():
    """InternVL's processor marks begin and end as an image too."""
    row, types = [1, START, IMAGE, END], [0, 1, 1, 1]
    with pytest.raises(PackingError, match="vision_start_id: 7 is a placeholder, says mm_token"):
        truncate(row, [1], 4, mm_token_type_ids=types, **MARKERS)
    with pytest.raises(PackingError, match="vision_start_id: 7 is a placeholder, says mm_token"):
        truncate(row, [1], 4, mm_token_type_ids=torch.tensor(types), **MARKERS)


def test_a_prompt_that_has_its_blocks_already_is_refused():
    """Gemma 3 writes another token where an image is to go."""
    family = get_family("gemma3")
    prompt = [2, *family.turn_opener, family.vision_start_id, family.image_token_id, 50]
    with pytest.raises(PackingError, match="prompt_ids hold 262144, a row of an image that has"):
        place_image_blocks(prompt, [[family.image_token_id]], family=family)


def test_many_breaks_take_no_more_than_linear_time():
    """Half a minute once."""
    row = [IMAGE, TEXT] + [BREAK] * 30_000
    assert truncate(row, [1], 0, IMAGE, break_token_ids=[BREAK]).output_ids == []
    row = [BREAK] * 30_000 + [TEXT, IMAGE]
    assert truncate(row, [1], 30_001, IMAGE, break_token_ids=[BREAK]).dropped_images == [0]
