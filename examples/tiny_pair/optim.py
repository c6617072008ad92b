"""Muon for the block matrices, AdamW for the rest, as one optimiser with one state dict."""

from __future__ import annotations

import torch
from torch import nn


def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices of g [N, R, C] (Jordan et al., 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(1, 2)
        x = a * x + (b * s + c * s @ s) @ x
    return x.transpose(1, 2) if tall else x


class MuonAdamW:
    """Muon (momentum .95, Nesterov) on the matrices inside the blocks, AdamW (.9, .98) on everything else."""

    def __init__(self, module: nn.Module, muon_lr: float, adam_lr: float) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.matrices = {n: p for n, p in named if p.ndim == 2 and ".layers." in n}
        rest = [p for n, p in named if n not in self.matrices]
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both learning rates times ``scale``."""
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        by_shape: dict[torch.Size, list[str]] = {}
        for name, p in self.matrices.items():
            by_shape.setdefault(p.shape, []).append(name)
        for shape, names in by_shape.items():
            updates = []
            for name in names:
                g = self.matrices[name].grad
                buffer = self.momentum[name].lerp_(g, 0.05)
                updates.append(g.lerp(buffer, 0.95))
            direction = orthogonalise(torch.stack(updates))
            rate = self.muon_lr * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            for name, d in zip(names, direction, strict=True):
                self.matrices[name].add_(d, alpha=-rate)

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        for p in self.matrices.values():
            p.grad = None

    def state_dict(self) -> dict[str, object]:
        return {"adam": self.adam.state_dict(), "momentum": self.momentum}

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        for name, buffer in state["momentum"].items():
            self.momentum[name].copy_(buffer)
