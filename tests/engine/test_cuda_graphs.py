"""engine.cuda_graphs without a GPU: a tape of operators, which replays as a CUDA graph does, in the same memory and without Python."""

import pytest
import torch
from tiny_runs import make, same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine.cuda_graphs import WARM_UP
from trainer.planning.memory import expected_memory
from trainer.planning.plan import resolve
from trainer.runtime.device import GPUS
from trainer.runtime.distributed import World
from trainer.training.step import optimiser_step

MODELS = {
    "hlb": {"name": "hlb"},  # counts the tokens of each step
    "gpt2": {"name": "gpt2"},
    "ngpt": {"name": "ngpt"},  # projects its weights
    "more heads": {"name": "llama", "d_model": 64, "n_layers": 2, "n_heads": 2, "n_predict": 3, "z_loss": 0.1},
}


class Tape(TorchDispatchMode):
    """Notes every operator with the tensors that it read and made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, made in self.calls:
            for old, new in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # not a view, nor in place
                    old.copy_(new)


class TapeRecorder:
    def __init__(self, model):
        self.model, self.runs, self.recordings, self.replays, self.forgotten = model, 0, 0, 0, 0

    def run(self, call):
        self.runs += 1
        return call()

    def forget(self):
        self.forgotten += 1

    def record(self, call):
        self.recordings += 1
        gradients = [parameter.grad for parameter in self.model.parameters()]
        before = [gradient.clone() for gradient in gradients]
        with Tape() as tape:
            result = call()
        for gradient, value in zip(gradients, before, strict=True):
            gradient.copy_(value)  # recorded on a GPU, nothing would have run

        def replay():
            self.replays += 1
            tape.replay()
            return result

        return replay


@pytest.mark.parametrize("model", MODELS)
def test_replayed_microbatches_are_those_that_run(tiny_dataset, tmp_path, model):
    """Sequences that grow, four microbatches to a step, the norm of the first two: equal bit for bit, as the same operators run in
    the same order."""
    pairs = []
    for replays in (False, True):
        one = make(tiny_dataset, tmp_path, model=MODELS[model], batch__tokens_per_microbatch=128, log__noise_scale=True)
        recorder = TapeRecorder(one.model)
        if replays:
            one.engine.replay_microbatches(recorder)
        measured = [optimiser_step(one) for _ in range(8)]
        lengths = {m.sequence_length for m in measured}
        pairs.append(([m.measured.read() for m in measured], one.engine.tensors()))
    (plain, expected), (replayed, found) = pairs
    assert len(lengths) > 1 and recorder.recordings == len(lengths) == recorder.forgotten + 1
    assert recorder.runs == WARM_UP * len(lengths) and recorder.replays > recorder.runs
    assert replayed == plain
    assert same(found, expected)


def test_documents_are_those_of_each_microbatch(tiny_dataset, tmp_path):
    """Which tokens end a document is asked on the device, so that a replay sees those that it is given."""
    one = make(tiny_dataset, tmp_path, model={"name": "gpt2"}, data__separate_documents=True)
    one.engine.replay_microbatches(TapeRecorder(one.model))
    torch.manual_seed(0)
    ends = []
    for _ in range(WARM_UP + 2):
        tokens = torch.randint(0, 250, (2, 64))
        ends.append(tokens.clone())
        ends[-1][:, torch.randint(1, 60, ())] = one.plan.end_of_text
    replayed = [one.engine.backward({"tokens": tokens, "targets": tokens}, 1.0, True) for tokens in ends]
    plain = make(tiny_dataset, tmp_path, model={"name": "gpt2"}, data__separate_documents=True).engine
    assert [plain.backward({"tokens": tokens, "targets": tokens}, 1.0, True) for tokens in ends] == replayed


def test_recordings_are_given_up_once_one_must_be_larger(tiny_dataset, tmp_path):
    one = make(tiny_dataset, tmp_path, model={"name": "gpt2"})
    recorder = TapeRecorder(one.model)
    one.engine.replay_microbatches(recorder)
    made = []
    for sequences, length in ((2, 32), (1, 32), (2, 32), (4, 32), (2, 32), (2, 64), (2, 32)):
        for _ in range(WARM_UP + 1):
            tokens, targets = torch.randint(0, 250, (2, sequences, length))
            one.engine.backward({"tokens": tokens, "targets": targets}, 1.0, True)
        made.append((recorder.recordings, recorder.forgotten))
    assert made == [(1, 0), (2, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 3)]
    assert recorder.runs == 4 * WARM_UP, "each shape is warmed up once"


@pytest.mark.parametrize(
    "gpu, settings, why",
    [
        (None, {"device": "cpu"}, "a CPU has none"),
        ("a100-40gb", {"engine": {"strategy": "fsdp"}}, "fsdp sums gradients during the backward"),
        ("a100-40gb", {"precision": "pure_bf16"}, "pure_bf16 moves the gradients"),
        ("a100-40gb", {"engine": {"activation_checkpointing": "selective"}}, "activation checkpointing reads"),
        ("a100-40gb", {"model": {"name": "llama", "kernels": "liger"}}, "Liger's loss waits for the device"),
    ],
)
def test_where_there_are_none(gpu, settings, why):
    config = build(RunConfig, {**settings, "engine": {"cuda_graphs": True, **settings.get("engine", {})}})
    with pytest.raises(UserError, match=f"engine.cuda_graphs: {why}"):
        resolve(config, None, World(), GPUS[gpu] if gpu else None)


def test_a_plan_counts_recorded_activations_beside_others_and_all_gradients():
    needs = []
    for graphs in (False, True):
        values = {"model": {"name": "gpt2"}, "engine": {"cuda_graphs": graphs, "activation_checkpointing": "none"}}
        values["batch"] = {"tokens_per_step": 4096, "tokens_per_microbatch": 4096}
        needs.append(expected_memory(resolve(build(RunConfig, values), None, World(), GPUS["a100-40gb"])))
    without, recorded = needs
    assert recorded["activations"] == 2 * without["activations"]
    assert recorded["total"] == without["total"] + without["activations"] + without["gradients"]
