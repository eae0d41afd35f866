"""Out-of-tree SGLang platform for machines without a GPU: ``SGLANG_PLATFORM=pevlm_cpu``.

SGLang's own CPU engine needs a CPU build of sglang-kernel, which PyPI does not carry. This platform
needs PyTorch alone.
"""

import os


def _asked_for() -> bool:
    return os.environ.get("SGLANG_PLATFORM") == "pevlm_cpu"


def activate() -> str | None:
    """Entry point ``sglang.srt.platforms``: the platform's dotted class name, or None to stay out.

    Inactive unless asked for by name, so that installing it changes nothing on a GPU machine.
    """
    if not _asked_for():
        return None
    # SGLang compiles some operators with torch.compile, which needs a C++ compiler on the CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    return "pevlm_cpu.platform.PevlmCpuPlatform"


def register() -> None:
    """Entry point ``sglang.srt.plugins``: runs once SGLang can be imported."""
    if _asked_for():
        from pevlm_cpu.vision import install_segmented_vision_attention

        install_segmented_vision_attention()
