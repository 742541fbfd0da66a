"""PLEASE RESTORE: the earlier content of this file was overwritten by mistake at 12:04 (by H2).

Its author has to write it again; nothing else depends on this placeholder. Sorry.
"""
