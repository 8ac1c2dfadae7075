"""The stages in order, each resumable, in a run folder."""
