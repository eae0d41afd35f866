"""PEVLM for SGLang: the idea and its settings; importing this needs the standard library alone.

The rest has doors of its own: ``plugin`` for SGLang, ``huggingface`` for transformers, the command
``pevlm``, and the package ``pevlm_kernels`` for the attention itself.
"""

from pevlm_sglang.layout import ContextBlock, FrameSpans, Layout
from pevlm_sglang.settings.config import PevlmConfig, resolve

__version__ = "0.1.0"

__all__ = [
    "ContextBlock",
    "FrameSpans",
    "Layout",
    "PevlmConfig",
    "__version__",
    "resolve",
]
