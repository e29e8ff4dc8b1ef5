"""Rehearse decoding on a GPU that is not there: prints what the host waited for while texts were made.

    python tests/rehearsal/decode.py MODEL OPTIONS [fault]      OPTIONS: of Sampling, as JSON; fault: logits go to the CPU

Faked, besides what fake_gpu.py says: tensors have no numbers, so that each chosen token is 0, and nothing is compared. Beginning
(the prompts, the state of the cache) may wait for the device; the passes after it may not, except to fetch their tokens.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from fake_gpu import NoWaiting, fake_gpus  # noqa: E402, I001  (before torch)
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from models.base import get_model, load_models  # noqa: E402
from trainer.engine.base import autocast  # noqa: E402
from trainer.inference import decoding  # noqa: E402
from trainer.inference.sampling import Sampling  # noqa: E402

GENERATOR, TOKENS = torch.Generator, 5


class Runner:
    """The model on the GPU, in bf16."""

    precision = "bf16"

    def __init__(self, model, device):
        self.model, self.device = model, device

    def autocast(self):
        return autocast(self.device, self.precision)

    def agree(self, value):
        return value

    def predict(self, tokens, documents=None, cache=None):
        return self.model(tokens, documents=documents, cache=cache).logits


def main(name: str, options: dict, fault: bool) -> None:
    load_models()
    fetched: list[int] = []

    def fetch(numbers):
        fetched.append(numbers.shape[1])
        # Each pass chooses the tokens of one position.
        known = decoding_of[0].known
        first = min(known[i] for i in decoding_of[0].live)
        return [[0] * (numbers.shape[1] - 1) + [max(n, first + 1)] for n in known]

    decoding_of: list = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_gpus("h100-80gb", 0, 1, False))
        stack.enter_context(mock.patch("torch.Generator", lambda device=None: GENERATOR()))
        stack.enter_context(mock.patch("torch.Tensor.exponential_", lambda self, generator=None: self))
        stack.enter_context(mock.patch("trainer.inference.reader.why_not_incremental", lambda *_: ""))
        stack.enter_context(mock.patch("trainer.inference.decoding.fetch", fetch))
        cls = get_model(name)
        config, device = cls.config_for_scale(0.1, 512, 500_000), torch.device("cuda", 0)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        with device:
            runner = Runner(cls(config).eval(), device)
        prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
        batch = decoding.Decoding(runner, prompts, TOKENS, 500, 0, Sampling(**options), print, False)
        decoding_of.append(batch)
        if fault:
            read = batch.reader.read
            batch.reader.read = lambda *arguments: read(*arguments).cpu()
        with NoWaiting():
            while batch.live:
                for event in batch.advance(None, 0, None):
                    batch.take(event, None, lambda row, new: False, None)
    assert [len(new) for new in batch.new] == [TOKENS] * 3
    print(json.dumps({"passes": batch.reader.forwards, "fetched": len(fetched), "device": str(batch.tokens.device)}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:] == ["fault"])
