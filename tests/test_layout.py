"""The laws of the layout: boundaries, lengths, positions, padding, truncation, errors."""

import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import mcore_packing as mp
from mcore_packing import PackedLayout, RowSpec
from mcore_packing.expand import expand_tokens, source_positions

from . import oracle
from .laws import examples
from .packs import IMAGE, NAMED, Row, build, lay_out, make_row, structures

pytestmark = pytest.mark.usefixtures("megatron", "poisoned_memory")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def cumsum(lengths) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def check_laws(row: Row) -> None:
    layout = build(row)
    # Law 1 and 2: the boundaries are the lengths Megatron gives each sequence by itself.
    assert layout.cu_seqlens_expanded.tolist() == cumsum(oracle.lengths(row))
    # Law 4.
    start = layout.expanded_start
    assert torch.equal(layout.cu_seqlens_expanded, start[row.cu_seqlens.long()])
    is_image = row.input_ids == IMAGE
    rows = torch.ones_like(row.input_ids).masked_scatter(is_image, row.tokens_per_image)
    assert start.tolist() == cumsum(rows.tolist())
    # Law 6: the last boundary is the row, and nothing is left for a tail.
    assert layout.num_expanded == start[-1] and not layout.has_tail
    assert layout.cu_seqlens_padded[-2:].tolist() == [layout.num_expanded] * 2
    assert layout.max_seqlen == max(oracle.lengths(row)) and type(layout.max_seqlen) is int
    for position_ids, cu in (
        (layout.position_ids, layout.cu_seqlens_expanded),
        (layout.position_ids_collapsed, layout.cu_seqlens_collapsed),
    ):
        lengths = cu.diff().tolist()
        assert position_ids.tolist() == [i for length in lengths for i in range(length)]
    assert not layout.padding_mask.any()
    # Law 5: what is expanded already comes back.
    expanded = lay_out(
        row.input_ids, layout.cu_seqlens_expanded, row.tokens_per_image, space="expanded"
    )
    for name in ("cu_seqlens_collapsed", "cu_seqlens_expanded", "cu_seqlens_padded"):
        assert torch.equal(getattr(expanded, name), getattr(layout, name))
    assert torch.equal(expanded.seq_start_collapsed, layout.seq_start_collapsed)


def test_a_layout_says_what_it_is():
    ids = int32(1, IMAGE, 2, 3, 4, 5).long()
    layout = lay_out(ids, int32(0, 4, 6), torch.tensor([7]))
    sizes = "2 sequences, 1 images, 6 tokens -> 12 positions"
    assert repr(layout) == f"PackedLayout({sizes}, cpu)"
    bounds = PackedLayout.from_boundaries(int32(0, 4, 6), 6)
    assert repr(bounds) == "PackedLayout(2 sequences, 6 positions, cpu)"


@pytest.mark.parametrize("structure", NAMED.values(), ids=NAMED)
def test_laws_named(structure):
    check_laws(make_row(structure))


@examples(2000)
@hypothesis.given(structures())
def test_laws(structure):
    check_laws(make_row(structure))


@hypothesis.given(structures(), st.integers(1, 9), st.integers(1, 5))
def test_padding(structure, seq_multiple, factor):
    row = make_row(structure)
    bare = build(row)
    total_multiple = seq_multiple * factor
    layout = build(row, seq_multiple=seq_multiple, total_multiple=total_multiple)
    lengths = layout.cu_seqlens_padded[:-1].diff()
    assert torch.equal(layout.cu_seqlens_expanded, bare.cu_seqlens_expanded)
    assert torch.equal(lengths, -(-bare.cu_seqlens_expanded.diff() // seq_multiple) * seq_multiple)
    used = int(layout.cu_seqlens_padded[-2])
    assert layout.num_expanded == -(-used // total_multiple) * total_multiple
    assert layout.cu_seqlens_padded[-1] == layout.num_expanded
    assert layout.has_tail == (layout.num_expanded > used)
    assert layout.max_seqlen == int(layout.cu_seqlens_padded.diff().max())
    # Positions go on through the padding of a sequence and restart behind it.
    lengths = layout.cu_seqlens_padded.diff().tolist()
    assert layout.position_ids.tolist() == [i for length in lengths for i in range(length)]
    assert int((~layout.padding_mask).sum()) == bare.num_expanded


@hypothesis.given(structures(), st.integers(0, 60), st.sampled_from([1, 2, 4]))
def test_truncation_keeps_the_front(structure, longest, multiple):
    row = make_row(structure)
    whole = build(row, seq_multiple=multiple)
    longest = longest // multiple * multiple
    options = {"seq_multiple": multiple, "max_length": longest}
    layout = build(row, on_overflow="truncate", **options)
    assert layout.num_expanded == min(longest, whole.num_expanded)
    assert torch.equal(layout.cu_seqlens_padded, whole.cu_seqlens_padded.clamp(max=longest))
    kept = layout.cu_seqlens_padded[:-1].diff()
    assert torch.equal(
        layout.cu_seqlens_expanded.diff(), whole.cu_seqlens_expanded.diff().min(kept)
    )
    if layout.num_expanded:
        assert torch.equal(expand_tokens(layout).source, expand_tokens(whole).source[:longest])
        assert torch.equal(layout.position_ids, whole.position_ids[:longest])
    is_text = row.input_ids != IMAGE
    position = source_positions(whole, row.num_image_embeddings).text
    assert torch.equal(layout.is_cut[is_text], (position >= longest)[is_text])
    if layout.num_expanded < whole.num_expanded:
        with pytest.raises(mp.PackingError, match="there is room for"):
            build(row, **options)


def test_a_known_length_gives_the_surplus_to_the_tail():
    row = make_row([[0, 1, 0], [0, 0]])
    layout = build(row, fixed_length=16)
    assert layout.cu_seqlens_padded.tolist() == [0, 7, 9, 16]
    assert layout.has_tail and layout.num_expanded == 16
    assert layout.padding_mask.tolist() == [False] * 9 + [True] * 7
    with pytest.raises(
        mp.PackingError, match="has 9 positions, but there is room for 8; pack rows"
    ):
        build(row, fixed_length=8)
    cut = build(row, fixed_length=8, max_length=8, on_overflow="truncate")
    assert cut.cu_seqlens_padded.tolist() == [0, 7, 8, 8]
    assert cut.is_cut.tolist() == [False, False, False, False, True]
    with pytest.raises(
        mp.PackingError, match="fixed_length is 16, expected at most max_length = 12"
    ):
        build(row, fixed_length=16, max_length=12)


def test_padding_that_does_not_fit_says_how_much_it_needs():
    row = make_row([[0, 1, 0], [0, 0]])  # 7 and 2 positions
    message = "12 positions, but there is room for 8: 9 of its sequences, and 3 of padding"
    with pytest.raises(mp.PackingError, match=message):
        build(row, seq_multiple=4, max_length=8)


def test_what_is_behind_the_last_boundary_may_be_cut_off():
    ids = torch.tensor([1, IMAGE, 2, 0, 0, 0, 0])
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    layout = lay_out(ids, cu_seqlens, [4], max_length=7)
    assert layout.cu_seqlens_padded.tolist() == [0, 6, 7]
    assert layout.is_cut.tolist() == [False] * 4 + [True] * 3


def test_a_boundary_at_the_maximum_may_lie_inside_an_image():
    # A data path cut its row of 9 at 6, inside the image. That is geometry, and no consent: what is
    # behind is counted as cut off.
    ids, cu_seqlens = torch.tensor([1, 2, IMAGE, 3]), int32(0, 2, 6)
    layout = lay_out(ids, cu_seqlens, [6], "expanded", max_length=6)
    assert layout.cu_seqlens_padded.tolist() == [0, 2, 6, 6]
    assert layout.is_cut.tolist() == [False, False, False, True] and layout.num_cut == 1
    with pytest.raises(mp.PackingError, match="9 positions, but there is room for 6"):
        lay_out(ids, int32(0, 2, 9), [6], "expanded", max_length=6)


def test_real_and_padded_boundaries():
    # ids [1, 2, 3, P, 6, <img>, P, P], an image of 4 rows; the padding tokens are the row's own.
    ids = torch.tensor([1, 2, 3, 0, 6, IMAGE, 0, 0])
    real = torch.tensor([0, 3, 5], dtype=torch.int32)
    padded = torch.tensor([0, 4, 8], dtype=torch.int32)
    options = {"space": "collapsed", "cu_seqlens_padded": padded}
    layout = lay_out(ids, real, [4], **options)
    assert layout.cu_seqlens_expanded.tolist() == [0, 3, 8]
    assert layout.cu_seqlens_collapsed.tolist() == [0, 3, 5]
    assert layout.cu_seqlens_padded.tolist() == [0, 4, 11, 11]
    assert layout.padding_mask.nonzero().flatten().tolist() == [3, 9, 10]
    layout = lay_out(ids, real, [4], seq_multiple=4, **options)
    assert layout.cu_seqlens_padded.tolist() == [0, 4, 12, 12]
    longer = torch.tensor([0, 5, 6], dtype=torch.int32)
    with pytest.raises(mp.PackingError, match="sequence 0: 5 long by cu_seqlens, but only 4"):
        lay_out(ids, longer, [4], **options)


@hypothesis.given(structures(), st.data())
def test_real_and_padded_boundaries_of_either_space(structure, data):
    row = make_row(structure)
    real = [data.draw(st.integers(0, end - begin)) for begin, end in row.spans()]
    real = torch.tensor(cumsum(real), dtype=torch.int32)
    ids, rows = row.input_ids, row.tokens_per_image
    collapsed = lay_out(ids, real, rows, space="collapsed", cu_seqlens_padded=row.cu_seqlens)
    start = collapsed.expanded_start
    begins, ends = row.cu_seqlens[:-1].long(), (row.cu_seqlens[:-1] + real.diff()).long()
    assert torch.equal(collapsed.cu_seqlens_expanded.diff(), start[ends] - start[begins])
    assert torch.equal(collapsed.cu_seqlens_collapsed, real)
    expanded = lay_out(
        ids, collapsed.cu_seqlens_expanded, rows, space="expanded",
        cu_seqlens_padded=collapsed.cu_seqlens_padded[:-1],
    )  # fmt: skip
    assert torch.equal(expanded.cu_seqlens_expanded, collapsed.cu_seqlens_expanded)
    assert torch.equal(expanded.cu_seqlens_collapsed, real)


def test_boundaries_inside_an_image_are_left_alone():
    # Megatron's own unit test: 512 lies inside a 577-row image.
    ids = torch.cat([torch.tensor([IMAGE]), torch.arange(1, 1024)])
    cu_seqlens = torch.tensor([0, 512, 1024, 1600], dtype=torch.int32)
    layout = lay_out(ids, cu_seqlens, [577], "expanded")
    assert layout.cu_seqlens_padded.tolist() == [0, 512, 1024, 1600, 1600]
    assert layout.position_ids[[511, 512, 1599]].tolist() == [511, 0, 575]
    layout = lay_out(ids, cu_seqlens, [577], "expanded", seq_multiple=5)
    assert layout.cu_seqlens_padded.tolist() == [0, 515, 1030, 1610, 1610]
    source = expand_tokens(layout).source
    assert source[[511, 512, 514, 515]].tolist() == [-2 - 511, -1, -1, -2 - 512]


def test_tokens_past_the_last_boundary_are_the_tail():
    row = make_row([[0, 1], [0, 0], [0, 2, 0]])
    layout = lay_out(row.input_ids, row.cu_seqlens[:-1], row.tokens_per_image, space="collapsed")
    assert layout.cu_seqlens_padded.tolist() == [0, 6, 8, 20] and layout.has_tail
    assert layout.position_ids[8:].tolist() == list(range(12))


@pytest.mark.parametrize("num_tokens, num_seqs", [(4_000_000, 1), (300_000, 65_536)])
def test_large_rows(num_tokens, num_seqs):
    ids = torch.ones(num_tokens, dtype=torch.int64)
    ids[::1000] = IMAGE
    cu_seqlens = torch.linspace(0, num_tokens, num_seqs + 1).int()
    rows = torch.full((int((ids == IMAGE).sum()),), 300)
    layout = lay_out(ids, cu_seqlens, rows)
    assert layout.num_expanded == num_tokens + rows.numel() * 299
    expected = layout.expanded_start[cu_seqlens.long()]
    assert torch.equal(layout.cu_seqlens_expanded, expected)


def test_one_list_per_sequence():
    row = make_row([[0, 1], [0, 0], [0, 2, 0, 1]])
    nested = [[5], [], [10, 5]]
    layout = lay_out(row.input_ids, row.cu_seqlens, nested)
    assert torch.equal(layout.cu_seqlens_expanded, build(row).cu_seqlens_expanded)
    with pytest.raises(
        mp.PlaceholderMismatch, match=r"sequence 0: 1 placeholders .* but 0 entries"
    ):
        lay_out(row.input_ids, row.cu_seqlens, [[], [5], [10, 5]])


@pytest.mark.parametrize(
    "last, options, length",
    [
        pytest.param(3, {"total_multiple": 8}, 2, id="tokens-and-padding"),
        pytest.param(5, {"total_multiple": 8}, 0, id="padding-alone"),
        pytest.param(3, {"max_length": 4, "on_overflow": "truncate"}, 1, id="cut"),
    ],
)
def test_the_tail_has_so_many_positions_that_are_no_padding(last, options, length):
    layout = lay_out(
        torch.arange(1, 6), int32(0, last), torch.zeros(0, dtype=torch.int64), **options
    )
    assert layout.tail_length.tolist() == [length]


def real_and_padded(real, padded) -> dict:
    return {"cu_seqlens": int32(*real), "cu_seqlens_padded": int32(*padded)}


def test_boundaries_of_a_stage_without_tokens():
    layout = PackedLayout.from_boundaries(int32(0, 5, 9), 12)
    assert layout.cu_seqlens_padded.tolist() == [0, 5, 9, 12] and layout.max_seqlen == 5
    assert layout.is_exact and not layout.has_tokens and layout.tail_length.tolist() == [3]
    by_four = RowSpec(seq_multiple=4)
    layout = PackedLayout.from_boundaries(
        int32(0, 3, 5), 8, by_four, cu_seqlens_padded=int32(0, 4, 8)
    )
    assert layout.padding_mask.nonzero().flatten().tolist() == [3, 6, 7]
    empty = PackedLayout.from_boundaries(int32(0, 5, 5, 9), 12)
    assert empty.cu_seqlens_padded.tolist() == [0, 5, 5, 9, 12]
    for given, message in (
        ({"cu_seqlens": int32(1, 5)}, "starts at 1, expected 0"),
        ({"cu_seqlens": int32(0, 5, 3)}, "sequence 1: cu_seqlens decreases by 2"),
        (real_and_padded([0, 4], [1, 5]), "starts at 1, expected 0"),
        (real_and_padded([0, 5, 3], [0, 8, 12]), "sequence 1: cu_seqlens decreases by 2"),
        (real_and_padded([0, 3, 5], [0, 8, 4]), "sequence 1: cu_seqlens decreases by 4"),
        ({"cu_seqlens": int32(0, 13)}, "the last boundary is 13, but this stage has 12 positions"),
        (
            {"cu_seqlens": int32(0, 4, 9), "spec": by_four},
            "sequence 1: 5 positions, expected a multiple of 4",
        ),
        (
            {"spec": RowSpec(max_sequences=1), "cu_seqlens": int32(0, 4)},
            "has 2 sequences, the tail",
        ),
        ({"cu_seqlens": int32(0, 4), "spec": 4}, "spec is 4, expected a mp.RowSpec"),
        ({"cu_seqlens": int32(0, 4).long()}, "cu_seqlens is torch.int64"),
    ):
        with pytest.raises(mp.PackingError, match=message):
            PackedLayout.from_boundaries(**{"length": 12, **given})
    cut = PackedLayout.from_boundaries(int32(0, 5, 13), 12, RowSpec(on_overflow="truncate"))
    assert cut.cu_seqlens_padded.tolist() == [0, 5, 12, 12]


def test_remap_cu_seqlens():
    row = make_row(NAMED["T63-N5-B3"])
    cu_seqlens = mp.remap_cu_seqlens(row.cu_seqlens, row.input_ids, row.tokens_per_image, IMAGE)
    assert cu_seqlens.tolist() == cumsum(oracle.lengths(row))
    assert cu_seqlens.dtype == torch.int32


IDS = torch.tensor([1, 2, IMAGE, 3, IMAGE, 4, 5])
CU_SEQLENS = torch.tensor([0, 3, 7], dtype=torch.int32)
COUNTS = torch.tensor([4, 6])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens": CU_SEQLENS.long()}, "cu_seqlens is torch.int64 .*expected torch.int32"),
        ({"cu_seqlens": CU_SEQLENS[None]}, r"cu_seqlens is torch.int32 \[1, 3\]"),
        ({"cu_seqlens": CU_SEQLENS.tolist()}, "cu_seqlens is a list"),
        ({"cu_seqlens": int32(0)}, "cu_seqlens has 1 entries"),
        ({"cu_seqlens": int32(1, 3, 7)}, "cu_seqlens starts at 1, expected 0"),
        ({"cu_seqlens": int32(0, 5, 3, 7)}, "sequence 1: cu_seqlens decreases by 2"),
        ({"cu_seqlens": int32(0, 3, 8)}, "the last boundary is 8, past the end of the row at 7"),
        ({"cu_seqlens": CU_SEQLENS.to("meta")}, "cu_seqlens is on meta, but input_ids on cpu"),
        ({"tokens_per_image": COUNTS.to("meta")}, "tokens_per_image is on meta"),
        (
            {"tokens_per_image": COUNTS[:1]},
            r"sequence 1: 1 placeholders \(id -200\) but 0 entries .* has 2 placeholders and 1",
        ),
        (
            {"tokens_per_image": COUNTS[:1], "cu_seqlens": int32(0, 2)},
            r"sequence 0: 2 placeholders \(id -200\) but 1 entries",  # the tail's count to the last
        ),
        (
            {"tokens_per_image": torch.tensor([4, 6, 8])},
            r"sequence 1: 1 placeholders \(id -200\) but 2 entries",
        ),
        ({"tokens_per_image": torch.tensor([4, 0])}, "image 1: tokens_per_image is 0"),
        ({"tokens_per_image": torch.tensor([-3, 4])}, "image 0: tokens_per_image is -3"),
        ({"tokens_per_image": torch.tensor([2**31, 4])}, "more than int32 can count"),
        ({"tokens_per_image": None}, "tokens_per_image is None, expected integers"),
        ({"tokens_per_image": 4}, "tokens_per_image is 4, expected integers"),
        ({"tokens_per_image": "46"}, "tokens_per_image is '46', expected integers"),
        ({"tokens_per_image": [4, [6]]}, r"tokens_per_image mixes ints and lists: \[4, \[6\]\]"),
        ({"tokens_per_image": [4, 2**70]}, "image 1: tokens_per_image is 1180591620717411303424"),
        ({"tokens_per_image": COUNTS + 0j}, "tokens_per_image is torch.complex64"),
        ({"num_image_embeddings": 10.0}, "num_image_embeddings is 10.0, expected an int"),
        ({"num_image_embeddings": "10"}, "num_image_embeddings is '10', expected an int"),
        ({"num_image_embeddings": 11}, "become 10 image embeddings, but there are 11"),
        ({"space": None}, "space is not said: pass space='collapsed'"),
        ({"space": "both"}, "space is 'both', expected 'collapsed' or 'expanded'"),
        ({"space": "auto"}, "space='auto' is no more: ask mp.find_space"),
        ({"spec": IMAGE}, "spec is -200, expected a mp.RowSpec"),
        (
            {"spec": RowSpec(max_sequences=2)},
            "has 3 sequences, the tail included, .* max_sequences=2",
        ),
        (
            dict.fromkeys(("input_ids", "cu_seqlens", "tokens_per_image"), IDS.to("meta")),
            "input_ids is on the meta device",
        ),
        ({"tokens_per_image": torch.tensor([2**30, 2**30])}, "more than int32 can count"),
        ({"tokens_per_image": COUNTS.float()}, "tokens_per_image is torch.float32"),
        ({"tokens_per_image": [[4], [6], []]}, "3 lists, but cu_seqlens 2 sequences"),
        ({"input_ids": IDS.float()}, "input_ids is torch.float32, expected int64"),
        ({"input_ids": IDS.to(torch.uint8)}, "input_ids is torch.uint8"),
        ({"input_ids": IDS.to(torch.int8)}, "input_ids is torch.int8"),
        ({"input_ids": IDS + 2**31}, "input_ids hold an id beyond int32"),
        ({"tokens_per_image": [4.7, 6]}, r"tokens_per_image is \[4.7, 6\], expected ints"),
        ({"tokens_per_image": [True, 6]}, r"tokens_per_image is \[True, 6\], expected ints"),
        ({"tokens_per_image": [[4], [6.0]]}, r"tokens_per_image is \[4, 6.0\], expected ints"),
        ({"tokens_per_image": COUNTS > 0}, "tokens_per_image is torch.bool"),
        ({"input_ids": IDS.expand(2, -1)}, r"input_ids is \[2, 7\], expected one packed row"),
        ({"input_ids": IDS[:0]}, "input_ids is empty"),
        ({"input_ids": IDS.tolist()}, "input_ids is a list"),
        ({"cu_seqlens_padded": int32(0, 7)}, "cu_seqlens_padded has 2 entries, expected 3"),
        # What 0.1 took says what takes its place.
        ({"image_token_id": IMAGE}, "no image_token_id= any more: pass spec=mp.RowSpec"),
        ({"num_padded_rows": 16}, "no num_padded_rows= any more: .*fixed_length"),
        ({"max_expanded": 16}, "no max_expanded= any more: .*max_length"),
        ({"strict": True}, "no strict= any more: mp.find_space"),
    ],
)
def test_bad_input(change, message):
    given = {"input_ids": IDS, "cu_seqlens": CU_SEQLENS, "tokens_per_image": COUNTS}
    given |= {"spec": RowSpec(image_token_id=IMAGE), "space": "collapsed", **change}
    before = {name: pickle.dumps(value) for name, value in given.items()}
    with pytest.raises(mp.PackingError, match=message):
        PackedLayout.build(**given)
    assert before == {name: pickle.dumps(value) for name, value in given.items()}


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'spaec'"):
        PackedLayout.build(IDS, CU_SEQLENS, COUNTS, spaec="collapsed")


def test_strided_boundaries_are_the_same_boundaries():
    strided = torch.stack([CU_SEQLENS, CU_SEQLENS + 1], 1)[:, 0]
    assert not strided.is_contiguous()
    layout = lay_out(IDS, strided, COUNTS)
    expected = lay_out(IDS, CU_SEQLENS, COUNTS)
    assert torch.equal(layout.cu_seqlens_expanded, expected.cu_seqlens_expanded)


def test_a_mismatch_names_both_numbers():
    with pytest.raises(mp.PlaceholderMismatch) as caught:
        lay_out(IDS, CU_SEQLENS, COUNTS[:1])
    assert (caught.value.actual, caught.value.expected) == (1, 2)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.actual, copy.expected, str(copy)) == (1, 2, str(caught.value))


class Mismatched(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        lay_out(IDS, CU_SEQLENS, COUNTS[:1])


def test_a_mismatch_survives_a_worker():
    loader = torch.utils.data.DataLoader(Mismatched(), num_workers=1)
    with pytest.raises(mp.PlaceholderMismatch, match="2 placeholders and 1 entries"):
        next(iter(loader))


def test_a_rank_needs_lengths_that_divide():
    layout = build(make_row([[0, 1, 0], [0, 0]]), seq_multiple=4)
    assert expand_tokens(layout, cp_size=2, cp_rank=1).source.numel() == layout.num_expanded // 2
    for cp_size, cp_rank in ((4, 0), (2, 2), (2, -1)):
        with pytest.raises(mp.PackingError):
            expand_tokens(layout, cp_size=cp_size, cp_rank=cp_rank)
