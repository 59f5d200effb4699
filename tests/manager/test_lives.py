"""Random lives, ten thousand operations a run, and the bugs that they find."""

from hypothesis import HealthCheck, settings

from tests.manager.lives import ManagerMachine

TestLives = ManagerMachine.TestCase
TestLives.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
