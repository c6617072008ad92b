"""Cases that the interpreter and a GPU both run."""

from __future__ import annotations

import torch

from atts_engine import ops

ONE = 1 << 32


def check_score_tokens(device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Ragged T, V and H; a row that is not finite; an id that is no token."""
    for dtype in dtypes:
        for rows, width, vocab in ((1, 16, 50), (37, 48, 300), (40, 33, 261)):
            g = torch.Generator().manual_seed(rows)
            # Quarters: their products add up without rounding. The interpreter's BLAS rounds by a row's place.
            hidden = ((torch.randn(rows, width, generator=g) * 4).round() / 4).to(dtype)
            weight = ((torch.randn(vocab, width, generator=g) * 4).round() / 4).to(dtype)
            ids = torch.randint(0, vocab, (rows,), generator=g)
            wanted = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            with ops.use("triton"):
                got = ops.score_tokens(hidden.to(device), weight.to(device), ids.to(device)).cpu()
                torch.testing.assert_close(got.double(), wanted, atol=3e-5, rtol=0)
                again = ops.score_tokens(hidden[-1:].to(device), weight.to(device), ids[-1:].to(device)).cpu()
            assert torch.equal(again, got[-1:])
    import atts_triton

    hidden = torch.tensor([[float("nan")], [1e4], [0.0]], device=device).expand(3, 16).contiguous()
    weight = torch.ones(40, 16, device=device)
    got = atts_triton.score_tokens(hidden, weight, torch.tensor([0, 0, 40], device=device))
    assert got[0].isnan() and got[2].isnan()
    assert abs(got[1].item() + torch.tensor(40.0).log().item()) < 1e-5


def check_gate(device: str) -> None:
    """To the bit, over rings that fill and wrap, ties, NaN, more arrivals than a ring holds, several row blocks."""
    for capacity in (1, 5, 300):
        expected = (torch.zeros(3, capacity), torch.zeros(3).long(), torch.zeros(3).long())
        store = tuple(tensor.clone().to(device) for tensor in expected)
        for seed, batch in enumerate((1, 9, 40, 70)):
            g = torch.Generator().manual_seed(seed)
            score = torch.randint(0, 6, (batch,), generator=g).float()
            score[seed % batch] = float("nan") if seed % 2 else float("inf")
            inputs = (
                torch.randint(0, 3, (batch,), generator=g),
                torch.randint(1, ONE + 1, (batch,), generator=g),
                torch.randint(1, ONE + 1, (batch,), generator=g),
                torch.rand(batch, generator=g) < 0.7,
            )
            key, level, u, insert = inputs
            with ops.use("reference"):
                wanted = ops.gate(score, key, *expected, level, u, insert)
            key, level, u, insert = (tensor.to(device) for tensor in inputs)
            with ops.use("triton"):
                got = ops.gate(score.to(device), key, *store, level, u, insert)
            for mine, theirs in zip((*got, *store), (*wanted, *expected)):
                torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)
