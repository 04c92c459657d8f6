"""How long the property tests take: a few seconds in `make test`, any number of minutes under `make fuzz`."""

from hypothesis import HealthCheck, Phase, settings

# A machine that is busy is slow, which is no failure; and a shared temporary folder is what these tests want.
COMMON = dict(deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
settings.register_profile("short", max_examples=60, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=2000, phases=list(Phase), **COMMON)
settings.load_profile("short")
