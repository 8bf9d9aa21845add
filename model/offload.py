"""What activation checkpointing keeps, moved to host memory until backward comes for it.

On CUDA copies run on a stream of their own, to and from page-locked buffers that are used again in every step;
while one layer's backward computes, the tensors of the layer before it are on their way back. On the CPU it is a
plain copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 1 << 20  # smaller tensors stay where they are


class _Buffers:
    """Host buffers by size in bytes, handed out and taken back."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def take(self, num_bytes: int, pinned: bool) -> Tensor:
        free = self._free.get(num_bytes)
        return free.pop() if free else torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)

    def give(self, buffer: Tensor) -> None:
        self._free.setdefault(buffer.numel(), []).append(buffer)


class _Slot:
    """One tensor in host memory. Its buffer goes back when the graph lets go of the slot."""

    def __init__(self, x: Tensor, buffers: _Buffers, peers: list[list[weakref.ref[_Slot]]]) -> None:
        self.device, self.uses = x.device, 0
        self.size, self.stride = x.size(), x.stride()
        self.peers, self.layer = peers, len(peers) - 1
        buffer = buffers.take(x.numel() * x.element_size(), pinned=x.is_cuda)
        weakref.finalize(self, buffers.give, buffer).atexit = False
        self.host = buffer.view(x.dtype).as_strided(self.size, self.stride)
        self.back: Tensor | None = None  # on the device again
        self.event: torch.cuda.Event | None = None  # when `back` is complete


class HostOffload:
    """One per model. `begin` before each forward pass, `layer` around what keeps tensors."""

    def __init__(self, min_bytes: int = MIN_BYTES) -> None:
        self._min_bytes = min_bytes
        self._buffers = _Buffers()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._peers: list[list[weakref.ref[_Slot]]] = []
        self._in_layer: dict[Any, tuple[Tensor, _Slot]] | None = None

    def begin(self) -> None:
        """A new forward pass: the layers that follow are its own."""
        self._peers = []

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Everything autograd saves inside goes through `pack` and `unpack`, unless inner hooks take it."""
        self._peers.append([])
        # The tensors packed so far, held so that their addresses stay theirs: one that is saved twice moves once.
        self._in_layer = {}
        try:
            with saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self._in_layer = None

    def pack(self, x: Tensor) -> Tensor | _Slot:
        """The tensor's slot; small, strided-with-gaps and parameter tensors stay as they are."""
        dense = x.numel() > 0 and _is_dense(x)
        if x.numel() * x.element_size() < self._min_bytes or not dense or isinstance(x, torch.nn.Parameter):
            return x
        seen = self._in_layer if self._in_layer is not None else {}
        key = (x.data_ptr(), x.dtype, x.size(), x.stride(), x._version)
        if key not in seen:
            slot = _Slot(x, self._buffers, self._peers)
            self._peers[-1].append(weakref.ref(slot))
            self._send(x, slot)
            seen[key] = (x, slot)
        slot = seen[key][1]
        slot.uses += 1
        return slot

    def unpack(self, kept: Tensor | _Slot) -> Tensor:
        """The tensor on its device. Starts the way back of the rest of its layer and of the layer before."""
        if isinstance(kept, Tensor):
            return kept
        for layer in (kept.layer, kept.layer - 1):
            for reference in kept.peers[layer] if layer >= 0 else ():
                slot = reference()
                if slot is not None and slot.back is None and slot.uses > 0:
                    self._fetch(slot)
        if kept.back is None:  # asked for once more than it was saved: a second backward pass
            self._fetch(kept)
        back = kept.back
        assert back is not None
        if kept.event is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.event)
        kept.uses -= 1
        if kept.uses <= 0:
            kept.back = None
        return back

    def _send(self, x: Tensor, slot: _Slot) -> None:
        source = x.detach()
        if not x.is_cuda:
            slot.host.copy_(source)
            return
        side = self._stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            slot.host.copy_(source, non_blocking=True)
        source.record_stream(side)

    def _fetch(self, slot: _Slot) -> None:
        back = torch.empty_strided(slot.size, slot.stride, dtype=slot.host.dtype, device=slot.device)
        slot.back = back
        if slot.device.type != "cuda":
            back.copy_(slot.host)
            return
        side = self._stream(slot.device)
        side.wait_stream(torch.cuda.current_stream(slot.device))  # `back` may be memory still in use there
        with torch.cuda.stream(side):
            back.copy_(slot.host, non_blocking=True)
            slot.event = torch.cuda.Event()
            slot.event.record(side)
        back.record_stream(side)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    order = sorted(range(x.ndim), key=lambda d: x.stride(d))
    expected = 1
    for d in order:
        if x.size(d) == 1:
            continue
        if x.stride(d) != expected:
            return False
        expected *= x.size(d)
    return True
