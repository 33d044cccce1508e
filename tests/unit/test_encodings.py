"""Equal texts are encoded once, as long as there is room for what comes of them."""

import torch

from hpcdit.models.encodings import Encodings


def encodings(most_bytes: int) -> tuple[Encodings, list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []

    def encode(text: str, length: int) -> tuple[dict[str, torch.Tensor], int]:
        calls.append((text, length))
        return {"text": torch.full((1, length, 250), float(len(calls)))}, len(text)

    return Encodings(encode, most_bytes), calls


def test_equal_texts_of_equal_lengths_are_encoded_once() -> None:
    found, calls = encodings(1 << 20)
    for _ in range(3):
        assert (
            found("a", 2)[0]["text"].shape == (1, 2, 250)
            and found("", 2)[1] == 0
            and found("a", 3)[0]["text"].shape[1] == 3
        )
    assert calls == [("a", 2), ("", 2), ("a", 3)]


def test_what_was_used_last_is_kept_and_memory_is_bounded() -> None:
    found, calls = encodings(3500)  # three of 1000 bytes, with their texts
    for text in "abcdefgh":
        found("mud", 1)
        found(text, 1)
    assert [text for text, _ in calls] == ["mud", *"abcdefgh"]
    assert [text for text, _ in found._kept] == ["g", "mud", "h"]
    found("x" * 5000, 1)
    assert not found._kept and found._bytes == 0, "too large alone"
    assert found("h", 1)[0]["text"][0, 0, 0] == len(calls) == 11
