"""Each placeholder of InternVL belongs to its own item.

SGLang hands out pad values in the order of its items, images first, to the prompt's ``<img>`` one
by one: a video before an image takes the image's, and both get wrong features
(sglang/srt/models/internvl.py, ``pad_input_ids``). The items' offsets say what is whose.
"""

from __future__ import annotations

from typing import Any

from pevlm_sglang.seams import wrap


def install(architecture: str) -> None:
    """Give pad values by offset. Runs in the scheduler.

    Raises:
        UnsupportedError: this SGLang lacks the seam.
    """
    from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens
    from sglang.srt.models.internvl import InternVLChatModel

    pattern = MultiModalityDataPaddingPatternMultimodalTokens()

    def by_offsets(pad_input_ids: Any) -> Any:
        return lambda self, input_ids, mm_inputs: pattern.pad_input_tokens(input_ids, mm_inputs)

    wrap(InternVLChatModel, "pad_input_ids", by_offsets, parameters=("input_ids", "mm_inputs"))
