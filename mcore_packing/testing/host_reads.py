"""A spy for what makes a GPU wait."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Lists in ``found`` where host and GPU wait for each other: values read, copied to the host,
    or asked for a shape, and blocking copies to the GPU. Works without a GPU, on CPU tensors or on
    fakes of a GPU's."""

    _READS = (
        "_local_scalar_dense",
        "nonzero",
        "item",
        "is_nonzero",
        "equal",
        "masked_select",
        "unique",
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        boolean = any(i is not None and i.dtype == torch.bool for i in indices)
        if boolean and name != "index":
            boolean = args[2].numel() > 1  # one value for all is a masked_fill
        if name.startswith(self._READS) or boolean or self._waits(name, args, kwargs):
            self.found.append(name)
        return function(*args, **kwargs)

    @staticmethod
    def _waits(name: str, args, kwargs) -> bool:
        """Whether a copy is one to the host, or one to a GPU that the host waits for."""
        if name == "_to_copy":
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
            non_blocking = kwargs.get("non_blocking", False)
        elif name == "copy_":
            source, target = args[1].device, args[0].device
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            return False
        if source.type == "cuda":
            return target.type == "cpu"
        return target.type == "cuda" and not non_blocking
