"""From the settings to what decides besides the state: the planner's limits, the policy, the groups that may grow.

The one place that makes these of settings, so that what is explained and foreseen is what is done.
"""

from manager.core.ahead import Setup
from manager.core.needs import Limits
from manager.group_needs import pack_groups
from manager.policies import policy_named
from manager.settings import Settings


def limits_of(settings: Settings) -> Limits:
    """The planner's limits."""
    slots = settings.slots
    return Limits(
        drain_target_s=slots.drain_target_s,
        idle_s=slots.idle_s,
        residence_s=slots.residence_s,
        slots_per_shape_max=slots.slots_per_shape_max,
        idle_per_node_max=slots.idle_per_node_max,
        preempt_s=settings.tasks.preempt_s,
    )


def setup_of(settings: Settings) -> Setup:
    """What decides besides the state.

    Raises:
        SettingsError: the policy of the settings is not there.
    """
    return Setup(
        limits=limits_of(settings),
        policy=policy_named(settings.placement.policy),
        groups=pack_groups(settings) if settings.autoscaler.mode == "active" else (),
        drain_target_s=settings.autoscaler.drain_target_s,
    )
