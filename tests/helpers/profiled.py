"""What a GPU is asked to execute."""

from __future__ import annotations

import torch


def launched(function) -> list[str]:
    """Names of what the device executes: kernels, copies, fills."""
    function()  # compiles
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
