"""Imported last by the process that the tests' own are forked from, as `running.py` says. Nothing else imports it."""

import gc
import os

# Python 3.11 and earlier tell it no other way where the modules are that it is to import; no process needs it later.
if (before := os.environ.pop("NOISEFIT_TEST_PYTHONPATH")) == "":
    del os.environ["PYTHONPATH"]
else:
    os.environ["PYTHONPATH"] = before

gc.collect()
gc.freeze()  # no forked process looks through it, and so copies it
