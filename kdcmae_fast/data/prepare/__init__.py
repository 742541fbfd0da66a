"""From videos, lists and manifests to a dataset on disk: shards, or the CAV-MAE layout."""

from kdcmae_fast.data.prepare.run import Outcome, prepare
from kdcmae_fast.data.prepare.settings import PRESETS, PrepareSettings, make_settings

__all__ = ["PRESETS", "Outcome", "PrepareSettings", "make_settings", "prepare"]
