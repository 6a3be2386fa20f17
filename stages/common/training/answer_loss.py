"""The training loss on answers alone, with the LM head run on no other position."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import PeftModel
from torch import distributed
from torch.utils.data import BatchSampler, DataLoader
from trl import SFTTrainer

from stages.common.acceleration.attention import Rows
from stages.common.acceleration.recording import Recording
from stages.common.scoring.answer_logits import answer_logits
from stages.common.sharding import is_sharded
from stages.common.training.collating import IGNORED
from stages.common.training.reducing import agreeing, average, broadcast
from stages.common.training.rows import answer_tokens
from stages.common.training.shares import EpochOrder, EvaluationShares, StepShares

# Each holds a graph; other shapes run as they come. Rows of a few lengths need fewer.
MOST_RECORDINGS = 16


class AnswerLossTrainer(SFTTrainer):
    """TRL's trainer with a loss that scores answer positions only, on every kind of device.

    TRL does that on CUDA; on a CPU it projects every position onto the vocabulary, which takes half of the time of a
    small model. It also reads per-step statistics back from the device, which this leaves out.

    Several processes share the rows of each step. Their gradients are summed once a step, by this class and not by
    DistributedDataParallel: it hooks into a backward pass, and a recorded step has none.

    Attributes:
        records_steps: whether to record a step's kernels and replay them; for rows laid end to end on a GPU.
        most_tokens_of_a_row: of rows laid end to end, and of what fills them up.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.records_steps = False
        self.most_tokens_of_a_row = 0
        self._recordings: dict[tuple[torch.Size, ...], Recording] = {}
        # The answer tokens of a step are counted, and divide its loss, whatever the model's forward pass accepts.
        self.model_accepts_loss_kwargs = True
        if distributed.is_initialized():
            # Prepared for evaluation, and so not wrapped when training prepares it.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            broadcast([*self._trained])

    @property
    def adapter(self) -> PeftModel:
        """The model that is trained, without what may wrap it."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PeftModel)
        return model

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean negative log-likelihood of an answer token, in nats, over the whole optimizer step.

        With `weights` in the batch, each token's is multiplied by the weight of its row. The divisor stays the number
        of tokens: weights are 1 on average, so that the loss keeps its scale.
        In evaluation, batches are weighted so that the mean over all of them is the mean over all answer tokens,
        whatever the batch size.
        """
        assert not return_outputs, "only losses are asked for"
        logits = self._answer_logits(model, inputs)
        if "weights" in inputs:
            losses = torch.nn.functional.cross_entropy(
                logits, inputs["targets"], reduction="none", ignore_index=IGNORED
            )
            loss = (losses * inputs["weights"]).sum()
        else:
            loss = torch.nn.functional.cross_entropy(logits, inputs["targets"], reduction="sum", ignore_index=IGNORED)
        if num_items_in_batch is None:
            assert not model.training, "a training step knows how many answer tokens it has"
            if self.accelerator.num_processes > 1:
                # The mean over all batches of all processes is taken of this.
                batches = len(self._evaluation_share) * self.accelerator.num_processes
                return loss * batches / self._evaluation_tokens
            rows = len(inputs["boundaries"]) - 2 if "boundaries" in inputs else len(inputs["labels"])
            return loss / (rows * self._evaluation_tokens_per_row)
        # num_items_in_batch counts the answer tokens of all processes; losses and gradients are averaged over them.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _answer_logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if "boundaries" not in inputs:
            arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return answer_logits(model, self.adapter.get_output_embeddings(), arguments, inputs["kept"])
        arguments = {name: inputs[name] for name in ("input_ids", "position_ids", "kept")}
        layout = Rows(inputs["boundaries"], self.most_tokens_of_a_row)
        logits: torch.Tensor = model(**arguments, layout=layout, use_cache=False).logits[0]
        return logits.float()

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Loss and gradients of a micro-batch; after the last one of a step, gradients are those of all processes."""
        if self.accelerator.num_processes == 1:
            return self._run(model, inputs, num_items_in_batch)
        loss: torch.Tensor = self._together(lambda: self._run(model, inputs, num_items_in_batch))
        if self.accelerator.sync_gradients:
            average([parameter.grad for parameter in self._trained])  # type: ignore[misc]
        return loss

    def prediction_step(self, *arguments: Any, **named: Any) -> Any:
        """Loss of a batch in evaluation; out of memory on one process, it is so on all."""
        return self._together(lambda: super(AnswerLossTrainer, self).prediction_step(*arguments, **named))

    def _together(self, work: Callable[[], Any]) -> Any:
        # With a sharded base the others wait within a layer, where there is nothing to agree on.
        base: Any = self.adapter.get_base_model()
        return work() if is_sharded(base) else agreeing(work)

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Evaluate with every process on its share of the rows, none of which is counted twice."""
        if self.accelerator.num_processes > 1:
            # The other one would cut off what accelerate repeats to make shares even; here nothing is repeated.
            self.gather_function = self.accelerator.gather
        return super().evaluation_loop(*arguments, **named)

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches."""
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        if processes == 1:
            return super().get_train_dataloader()
        assert isinstance(self.train_dataset, Dataset)
        arguments = self.args
        rows, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        order = self._get_train_sampler(self.train_dataset)
        shares = StepShares(self.train_dataset, order, rows, accumulation, processes, index)
        return self._load(self.train_dataset, shares)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        """The order of the rows, which transformers asks for where one process has them all."""
        assert self.args.data_seed is not None, "trainer_config gives one"
        return EpochOrder(len(train_dataset), self.args.data_seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's batches to evaluate on."""
        return (
            super().get_eval_dataloader(eval_dataset) if self.accelerator.num_processes == 1 else self._evaluation_share
        )

    @cached_property
    def _evaluation_share(self) -> DataLoader:
        assert isinstance(self.eval_dataset, Dataset)
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        rows = self.args.per_device_eval_batch_size
        return self._load(self.eval_dataset, EvaluationShares(len(self.eval_dataset), rows, processes, index))

    def _load(self, rows: Dataset, batches: BatchSampler) -> DataLoader:
        loader = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,  # they are shared out already
            process_index=0,
            put_on_device=True,
            non_blocking=self.args.dataloader_pin_memory,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )

    def _load_best_model(self) -> None:
        """Read the best checkpoint when rank 0 has written it."""
        self.accelerator.wait_for_everyone()
        super()._load_best_model()

    def _run(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Loss and gradients of a micro-batch, replayed from a recording where steps are recorded."""
        if not self.records_steps:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        inputs["num_items_in_batch"] = torch.as_tensor(num_items_in_batch, device=self.args.device)
        shapes = tuple(tensor.shape for tensor in inputs.values())
        if shapes not in self._recordings:
            if len(self._recordings) == MOST_RECORDINGS:
                del inputs["num_items_in_batch"]
                return super().training_step(model, inputs, num_items_in_batch)
            model.train()
            self._recordings[shapes] = Recording(self._write_gradients, inputs, self._recordings_memory)
        loss: torch.Tensor = self._recordings[shapes](inputs)
        self._add_gradients()
        return loss.clone()

    def _write_gradients(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What is recorded: the loss, and gradients written into the buffers that all recordings share."""
        assert self.model is not None
        loss = self.compute_loss(self.model, inputs, num_items_in_batch=inputs["num_items_in_batch"])
        torch._foreach_copy_(self._gradients, torch.autograd.grad(loss, self._trained))
        return loss.detach()

    def _add_gradients(self) -> None:
        if self._trained[0].grad is not None:
            torch._foreach_add_([parameter.grad for parameter in self._trained], self._gradients)  # type: ignore[arg-type,misc]
            return
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            # The next micro-batch's replay writes into the same buffers.
            parameter.grad = gradient if self.args.gradient_accumulation_steps == 1 else gradient.clone()

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> Any:
        """The norm that clipping found; transformers would read it from the device in every step, and wait for it."""
        return super()._get_grad_norm(model, grad_norm) if grad_norm is None else grad_norm

    @cached_property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]

    @cached_property
    def _gradients(self) -> list[torch.Tensor]:
        return [torch.zeros_like(parameter) for parameter in self._trained]

    @cached_property
    def _recordings_memory(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @cached_property
    def _evaluation_tokens_per_row(self) -> float:
        assert isinstance(self.eval_dataset, Dataset)
        return self._evaluation_tokens / len(self.eval_dataset)

    @cached_property
    def _evaluation_tokens(self) -> int:
        assert isinstance(self.eval_dataset, Dataset)
        return answer_tokens(self.eval_dataset)
