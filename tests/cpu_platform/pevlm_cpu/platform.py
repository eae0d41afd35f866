"""The platform class. Imported while SGLang itself is being imported: keep its imports few."""

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class PevlmCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """PyTorch on the CPU, with ``torch_native`` as the default attention backend."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"


# SGLang pins decoded video frames unless its own CPU engine is on; there is nothing to pin for.
torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
