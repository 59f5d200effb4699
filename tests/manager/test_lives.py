"""Random lives, ten thousand operations a run, and the bugs that they find."""

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.manager.lives import ManagerMachine
from tests.manager.mutations import MUTATIONS

TestLives = ManagerMachine.TestCase
TestLives.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def is_killed(mutation):
    """Whether random lives of a manager with this bug fail."""
    with pytest.MonkeyPatch.context() as patch:

        class Broken(ManagerMachine):
            def begin_with(self, name):
                super().begin_with(name)
                mutation(self.manager, patch)

        case = Broken.TestCase
        case.settings = settings(
            max_examples=200,
            stateful_step_count=50,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        try:
            case().runTest()
        except Exception:  # whatever a broken manager runs into
            return True
    return False


def test_nine_of_ten_bugs_are_found():
    assert len(MUTATIONS) >= 20
    survivors = [mutation.__name__ for mutation in MUTATIONS if not is_killed(mutation)]
    assert len(survivors) <= len(MUTATIONS) // 10, survivors
