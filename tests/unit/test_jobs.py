"""Jobs: a spec and the module that has its body find each other."""

from __future__ import annotations

from importlib import import_module

import pytest

from diffusion.jobs.specs import JobSpec


@pytest.mark.parametrize("spec", JobSpec.__subclasses__(), ids=lambda spec: spec.__name__)
def test_the_module_of_a_spec_has_the_job_that_it_is_for(spec: type[JobSpec]) -> None:
    assert import_module(spec.MODULE).JOB[0] is spec
