"""`kdcmae doctor`: what is wrong with a dataset, before a run finds out."""

from kdcmae_fast.data.doctor.checks import Check
from kdcmae_fast.data.doctor.diagnosis import Diagnosis, examine

__all__ = ["Check", "Diagnosis", "examine"]
