"""How the tokens of text and video are cut over ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hpcdit.mesh import cut
from hpcdit.models.split import Cut, Part, Split
from tests.unit.test_wan import Group, Member


class Block(torch.nn.Module):
    """Gives back what it is given."""

    def forward(self, video: Any, text: Any, table: Any, mask: Any = None) -> Any:
        return video, text, table, mask


@given(st.integers(0, 30), st.integers(30, 60), st.integers(1, 9), st.booleans(), st.data())
def test_each_token_is_one_ranks_and_keys_are_in_the_sequences_order(
    text: int, video: int, ranks: int, text_first: bool, data: st.DataObject
) -> None:
    shares = cut(text + video, ranks)
    split, block = Split(), Block()
    split.text_first = text_first
    cuts = {"video": Cut(Part.VIDEO, 0), "text": Cut(Part.TEXT, 0)}
    split.blocks([block], cuts, {"table": Cut(Part.BOTH, 0)}, mask="mask")
    videos, texts = torch.arange(video), 100 + torch.arange(text)
    both = torch.cat([texts, videos] if text_first else [videos, texts])
    counted = torch.tensor([data.draw(st.lists(st.booleans(), min_size=text, max_size=text))]).reshape(1, text).bool()
    found: list[tuple[Any, ...]] = []
    for rank in range(ranks):
        split.sequence = SimpleNamespace(tokens=shares[rank], shares=shares)
        found.append(block(videos, text=texts, table=both, mask=counted))
        *_, mask = found[-1]
        assert mask is None, "the blocks do not see it"
    assert torch.cat([each[0] for each in found]).equal(videos)
    assert torch.cat([each[1] for each in found]).equal(texts)
    sequence = torch.cat([each[2] for each in found])
    assert [len(each[2]) for each in found] == [len(part) for part in shares]
    for (mine, words, table, _), part in zip(found, shares, strict=True):
        assert table.equal(torch.cat([words, mine] if text_first else [mine, words])), "as attention has them"
        assert abs(len(words) - text * len(part) / (text + video)) < 1, "as large a part of the text as of all"
    assert split._keys is not None
    expected = torch.tensor([True if token < 100 else bool(counted[0, token - 100]) for token in sequence.tolist()])
    (places,) = split._keys.places([range(len(sequence))])
    assert expected.all() if places is None else expected.nonzero()[:, 0].equal(places)


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_operator_is_what_torch_compile_takes_it_for(heads_first: bool) -> None:
    """Its result is new and laid out as it is told to be, whatever the layouts of q, k and v."""
    split = Split()
    member = Member(Group(7), 0)
    split.sequence = member
    drawn = [torch.randn(2, 3, 7, 4).transpose(1, 2) if heads_first else torch.randn(2, 7, 3, 4) for _ in "qkv"]
    torch.library.opcheck(
        torch.ops.hpcdit.attend.default, (*drawn, split.number), test_utils=("test_schema", "test_faketensor")
    )
    q, k, v = (x.transpose(1, 2) for x in drawn)
    assert torch.ops.hpcdit.attend(*drawn, split.number).equal(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
    assert sorted(member.order[:3]) == ["k", "q", "v"]
