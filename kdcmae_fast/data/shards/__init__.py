"""Clips in WebDataset tar files with an index: written whole or not at all, read at random."""

from kdcmae_fast.data.shards.layout import PreparedClip, Skipped
from kdcmae_fast.data.shards.reader import ShardClips
from kdcmae_fast.data.shards.writer import finish_dataset, write_shard

__all__ = ["PreparedClip", "ShardClips", "Skipped", "finish_dataset", "write_shard"]
