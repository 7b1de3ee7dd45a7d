"""A model and prompts on the CPU under another default device: no tensor of ours is made where torch would put it.

The other device is "meta", which holds no numbers: whatever was forgotten shows at once, without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import hooks
import models
from interp import tasks
from interp.tasks.base import guess
from models.scan import dplr
from tests import default_device
from tests.interp.verbs import batches, tiny, verbs_of

pytestmark = pytest.mark.contract


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    default_device.put_back()


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    default_device.put_back()


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in ("mamba", "transformer") else pytest.mark.slow)
        for name in ("mamba", "twin", "s4d", "s4", "linear_attention", "transformer", "theory")
    ],
)
def test_every_question_has_the_same_answer_under_another_default_device(architecture: str) -> None:
    model, (batch, other) = tiny(architecture), batches()
    chosen = verbs_of(architecture)
    if architecture != "mamba":  # the verbs are the same code; what differs is in the models
        chosen = {
            name: verb for name, verb in chosen.items() if name in ("record", "patch", "swap", "matrix", "do_state")
        }
    expected = {name: verb(model, batch, other) for name, verb in chosen.items()}
    torch.set_default_device("meta")
    for name, verb in chosen.items():
        found = verb(model, batch, other)
        assert found.device.type == "cpu", name
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("pos", [2, [2], slice(0, 3), torch.tensor([0, 2]), torch.arange(9) < 3])
def test_an_edit_picks_its_positions_under_another_default_device(pos: object, elsewhere: None) -> None:
    delta = torch.ones(2, 9, 3, device="cpu")
    assert float(hooks.zero(pos=pos)(delta).sum()) < delta.numel()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompts_and_what_is_said_of_them_are_where_the_generator_is(name: str) -> None:
    def drawn() -> list[torch.Tensor]:
        task = tasks.build(name)
        batch = task.sample(4, torch.Generator().manual_seed(2))
        other = task.corrupt(batch, torch.Generator().manual_seed(3))
        said = [*task.variables(batch).values(), *task.baselines(batch).values(), guess(task, batch)]
        return [batch.tokens, batch.targets, batch.read, batch.kinds, *batch.truth.values(), other.tokens, *said]

    expected = drawn()
    torch.set_default_device("meta")
    for left, right in zip(drawn(), expected, strict=True):
        assert left.device.type == "cpu" and torch.equal(left, right)


def test_a_checkpoint_is_loaded_onto_the_cpu(elsewhere: None) -> None:
    model = models.load("s4-linreg")
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_what_is_kept_between_models_is_on_the_cpu(elsewhere: None) -> None:
    """The start of S4 is worked out once: a model on another device must not leave it there for the next."""
    dplr._legs.cache_clear()
    models.build("s4", d_model=4, n_layers=1, d_state=3)
    default_device.put_back()
    built = models.build("s4", d_model=4, n_layers=1, d_state=3)
    assert {weight.device.type for weight in built.parameters()} == {"cpu"}


def test_a_fresh_model_is_where_torch_puts_its_tensors(elsewhere: None) -> None:
    for architecture in models.ARCHITECTURES:
        built = models.build(architecture)
        assert {weight.device.type for weight in built.parameters()} == {"meta"}, architecture
