"""lmms-eval tasks that come with the package; `python -m pitome_vlm.lmms.tasks` says where."""
