"""A spy for what makes a GPU wait."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Lists in ``found`` what makes a GPU wait: values read, copied to the host, or asked for a
    shape. Works without a GPU, on CPU tensors or on fakes of a GPU's."""

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
        to_host = self._destination(name, args, kwargs) == "cpu"
        if name.startswith(self._READS) or boolean or to_host:
            self.found.append(name)
        return function(*args, **kwargs)

    @staticmethod
    def _destination(name: str, args, kwargs) -> str | None:
        """Where a copy from a GPU goes."""
        if name == "_to_copy" and args[0].is_cuda:
            return torch.device(kwargs.get("device") or args[0].device).type
        if name == "copy_" and args[1].is_cuda:
            return args[0].device.type
        return None
