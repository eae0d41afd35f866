"""The items of a processor's output, their clips put together again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Whole:
    """A video or an image.

    Attributes:
        items: SGLang's, a clip each.
    """

    items: list[Any] = field(default_factory=list)

    @property
    def kind(self) -> str:
        name: str = self.items[0].modality.name.lower()
        return name

    @property
    def pixels(self) -> torch.Tensor:
        """Of all clips, one after the other."""
        return torch.cat([torch.as_tensor(item.feature) for item in self.items])

    @property
    def grid(self) -> list[int]:
        """Qwen's: steps, patches in a column, patches in a row."""
        rows = [item.model_specific_data["video_grid_thw"].tolist() for item in self.items]
        ((_, height, width),) = rows[0]
        assert all(row == [[row[0][0], height, width]] for row in rows)
        return [sum(row[0][0] for row in rows), height, width]


def whole(items: Iterable[Any]) -> list[Whole]:
    """What the items are of, in prompt order."""
    found: list[Whole] = []
    for item in items:
        if not item.model_specific_data.get("pevlm_continues"):
            found.append(Whole())
        found[-1].items.append(item)
    return found
