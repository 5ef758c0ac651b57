"""A process that trains on packed rows by the lines of the guide for Megatron-Bridge.

test_bridge.py starts one or several. Bridge's model, its collate function, its data sets and its
loss are real, and so is Megatron's schedule. In the place of the recipe, which asks the hub for a
model of 12 billion parameters, is a small model of the same provider; in the place of ``finetune``,
which initialises CUDA, what it does with what the guide hands it.
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mcore_packing as mp
from mcore_packing.megatron.find import find_llava
from mcore_packing.testing import bridge
from mcore_packing.testing.sources import CHECKOUT, functions

COLLATE = "megatron.bridge.models.nemotron_vl.data.collate_fn"
NUM_SAMPLES = 6
WORDS = [f"w{i}" for i in range(200)]


class Processor:
    """What ``NemotronNanoVLV2Processor``, remote code on the hub, makes of a conversation.

    One placeholder an image, between two markers, with the ids that Bridge counts on.
    """

    def __init__(self):
        names = ["<unk>", "<pad>", "User", "Assistant", "<SPECIAL_11>", "<SPECIAL_12>", *WORDS]
        ids = {name: index for index, name in enumerate(names)}
        ids |= {"<image>": 131072, "<img>": 131073, "</img>": 131074}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            additional_special_tokens=["<SPECIAL_11>", "<SPECIAL_12>"],
        )

    def apply_chat_template(self, conversations, **options):
        (conversation,) = conversations
        text, images = [], []
        for turn in conversation:
            text.append(f"<SPECIAL_11> {turn['role'].capitalize()}")
            for part in turn["content"]:
                if part["type"] == "image":
                    text.append("<img> <image> </img>")
                    images.append(part["image"])
                else:
                    text.append(part["text"])
            text.append("<SPECIAL_12>")
        ids = self.tokenizer(" ".join(text), return_tensors="pt", add_special_tokens=False)
        return {
            "input_ids": ids["input_ids"],
            "attention_mask": ids["attention_mask"],
            "pixel_values": torch.cat(images),
            "num_patches": torch.tensor([len(image) for image in images]),
        }


def conversations() -> list[dict]:
    """Samples of one or two images, of one to three tiles."""
    generator = torch.Generator().manual_seed(0)

    def words() -> dict:
        count = int(torch.randint(3, 12, (), generator=generator))
        at = torch.randint(len(WORDS), (count,), generator=generator).tolist()
        return {"type": "text", "text": " ".join(WORDS[i] for i in at)}

    def image(tiles: int) -> dict:
        size = bridge.IMG_SIZE
        return {"type": "image", "image": torch.randn(tiles, 3, size, size, generator=generator)}

    found = []
    for index in range(NUM_SAMPLES):
        asked = [image(index % 3 + 1), words()] + [image(1)] * (index % 2)
        turns = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [words()]},
        ]
        found.append({"conversation": turns})
    return found


def recipe(sizes) -> SimpleNamespace:
    """What the guide's lines read and write of a recipe's settings."""
    builders = importlib.import_module("megatron.bridge.data.builders.direct_hf_sft")
    hub = importlib.import_module("megatron.bridge.data.sources.hf")
    return SimpleNamespace(
        model=bridge.nemotron_vl(
            tensor_model_parallel_size=sizes.tp, sequence_parallel=sizes.tp > 1
        ),
        dataset=builders.DirectHFSFTDatasetConfig(
            seq_length=4096,
            source=hub.HFDatasetSourceConfig(path_or_dataset="conversations"),
            do_validation=False,
            do_test=False,
            num_workers=0,
            persistent_workers=False,
        ),
        train=SimpleNamespace(micro_batch_size=1),
        ddp=DistributedDataParallelConfig(average_in_collective=True),
        rerun_state_machine=SimpleNamespace(check_for_nan_in_loss=True, check_for_spiky_loss=False),
    )


class Job:
    """In the place of ``finetune``: one step. Everything it calls is Bridge's or Megatron's."""

    def __call__(self, cfg, forward_step):
        cfg.dataset.finalize()
        cfg.model.finalize()
        (model,) = cfg.model.provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=True
        )
        self.cfg = cfg
        self.model = DistributedDataParallel(model.config, cfg.ddp, model)
        model.config.finalize_model_grads_func = finalize_model_grads
        self.rows = list(self.loader(cfg))
        self.reported = get_forward_backward_func()(
            forward_step_func=self.with_state(forward_step),
            data_iterator=iter(self.rows),
            model=[self.model],
            num_microbatches=len(self.rows),
            seq_length=cfg.model.seq_length,
            micro_batch_size=cfg.train.micro_batch_size,
            forward_only=False,
        )

    def loader(self, cfg):
        base = importlib.import_module("megatron.bridge.data.base")
        context = base.DatasetBuildContext(NUM_SAMPLES, 0, 0)
        train, _, _ = cfg.dataset.build_datasets(context)
        return torch.utils.data.DataLoader(
            train, batch_size=cfg.train.micro_batch_size, collate_fn=train.collate_fn
        )

    def with_state(self, forward_step):
        """As ``train`` does, by functions of Bridge out of a file that imports much else."""
        losses = importlib.import_module("megatron.bridge.training.losses")
        names = "needs_global_state_injection", "maybe_inject_state", "prepare_forward_step_func"
        namespace = {
            "inspect": inspect,
            "partial": functools.partial,
            "Optional": Optional,
            "GlobalState": SimpleNamespace,
            "ForwardStepCallable": object,
        }
        file = Path(inspect.getsourcefile(losses)).parent / "utils/train_utils.py"
        prepare = functions(file, names, namespace)["prepare_forward_step_func"]
        return prepare(forward_step, SimpleNamespace(cfg=self.cfg))


def run_guide(sizes) -> Job:
    """The guide's lines, as they stand there but for the size that a test asks for."""
    guide = (CHECKOUT / "docs/megatron-bridge.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    assert block.count("context_parallel_size = 2\n") == 1
    block = block.replace("context_parallel_size = 2\n", f"context_parallel_size = {sizes.cp}\n")
    job = Job()
    for name, function in (
        ("recipes.nemotron_vl.nemotron_nano_v2_vl.nemotron_nano_v2_vl_12b_sft_config", recipe),
        ("training.finetune.finetune", job),
    ):
        module, _, name = f"megatron.bridge.{name}".rpartition(".")
        sys.modules[module] = ModuleType(module)
        value = functools.partial(recipe, sizes) if function is recipe else job
        setattr(sys.modules[module], name, value)
    sys.path.insert(0, str(CHECKOUT / "examples"))
    builders = importlib.import_module("megatron.bridge.data.builders.direct_hf_sft")
    processor, samples = Processor(), conversations()
    for name, value in (  # of the hub
        ("load_direct_hf_sft_processor", lambda config, tokenizer: processor),
        ("load_direct_hf_sft_examples", lambda source, preprocessing: samples),
        ("prepare_hf_dataset_sources", lambda sources: None),
    ):
        assert hasattr(builders, name)
        setattr(builders, name, value)
    exec(block, {})
    return job


def refused(function, *args, **kwargs) -> str | None:
    """What a function of Bridge says against it."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def boundaries_of_llava_step(model, layout) -> torch.Tensor:
    """What Bridge's own step makes of collapsed boundaries, on its way to the model."""
    collapsed = layout.cu_seqlens_collapsed.int()
    packed = {"cu_seqlens_q": collapsed, "cu_seqlens_kv": collapsed}
    name = "_expand_packed_metadata_for_visual_embeddings"
    namespace = {"torch": torch, "Any": object, "unwrap_model": unwrap_model, "GPTModel": object}
    expand = functions(llava_step(), [name], namespace)[name]
    expand(packed, layout.input_ids[None], model)
    return packed["cu_seqlens_q"]


def llava_step() -> Path:
    losses = importlib.import_module("megatron.bridge.training.losses")
    return Path(inspect.getsourcefile(losses)).parent / "llava_step.py"


def refuses() -> list[str | None]:
    """What Bridge's own collate function and step say of packed rows on this job."""
    name = "_validate_packed_parallelism"
    step = functions(llava_step(), [name], {"get_pg_size": torch.distributed.get_world_size})[name]
    groups = SimpleNamespace(
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
    )
    collate = importlib.import_module(COLLATE).nemotron_nano_v2_vl_collate_fn
    return [
        refused(collate, conversations(), Processor(), enable_in_batch_packing=True),
        refused(step, pg_collection=groups),
    ]


def whole_parameters(model) -> list[str]:
    """The names of those that tensor-parallel ranks do not split."""
    return [
        name
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    ]


@torch.no_grad()
def one_by_one(model) -> tuple[float, int]:
    """The loss of every conversation by itself, unpacked, as Bridge's own collate function has it;
    and how many tokens are trained."""
    collate = importlib.import_module(COLLATE).nemotron_nano_v2_vl_collate_fn
    total, trained = 0.0, 0
    for example in conversations():
        batch = collate([example], Processor())
        with mp.unpacked(model):
            loss, mask = model(
                images=batch["visual_inputs"].pixel_values.float(),
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=None,
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
                num_image_tiles=batch["num_patches"],
            )
        total += float((loss * mask).sum())
        trained += int(mask.sum())
    return total, trained


@torch.no_grad()
def without_boundaries(model, rows) -> float:
    """The loss of packed rows whose boundaries are dropped."""
    total = 0.0
    for row in rows:
        with mp.unpacked(model):
            loss, mask = model(
                **{**row.to("cpu", torch.float32).inputs(), "packed_seq_params": None}
            )
        total += float((loss * mask).sum())
    return total


def main():
    parser = argparse.ArgumentParser()
    for size in ("cp", "tp"):
        parser.add_argument(f"--{size}", type=int, default=1)
    sizes = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bridge.make_importable()
    with bridge.on_cpu(context_parallel_size=sizes.cp, tensor_model_parallel_size=sizes.tp):
        torch.manual_seed(0)
        job = run_guide(sizes)
        packed = sum(reported["lm loss"] for reported in job.reported)  # loss, trained tokens
        dist.all_reduce(packed, group=parallel_state.get_context_parallel_group())
        example = sys.modules["bridge_nemotron_vl"]
        row = job.rows[0]
        isolation, verify = found = example.check(job.model, row)
        gradients = {name: p.main_grad.norm() for name, p in job.model.named_parameters()}
        result = {
            "packed": packed[0].item(),
            "num_trained": int(packed[1]),
            "samples_per_row": [len(row.indices) for row in job.rows],
            "seq_multiple": row.layout.spec.seq_multiple,
            "is_right": [isolation.is_right, verify.is_right],
            "says": [str(each) for each in found],
            "by_rank": verify.by_rank,
            "refuses": refuses(),
            "without_gradient": [name for name, norm in gradients.items() if not norm > 0],
            "gradients": {name: gradients[name].item() for name in whole_parameters(job.model)},
            "ours": find_llava(job.model)._packing_hook.plan.replaces_expansion,
        }
        if dist.get_world_size() == 1:
            job.model.eval()
            result["one_by_one"], result["trained_one_by_one"] = one_by_one(job.model)
            theirs = boundaries_of_llava_step(job.model, row.layout)
            result["same_boundaries"] = torch.equal(theirs, row.layout.cu_seqlens_expanded)
            small = dataclasses.replace(row.layout.spec, max_length=row.layout.num_expanded - 1)
            samples = conversations()[: len(row.indices)]
            result["too_long"] = refused(example.collate, samples, Processor(), spec=small)
            result["dropped"] = without_boundaries(job.model, job.rows)
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()  # else gloo's threads can abort the interpreter's exit


if __name__ == "__main__":
    main()
