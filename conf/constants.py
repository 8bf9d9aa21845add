"""Values shared by packages that must not import each other."""

IGNORE_INDEX = -100  # label without loss, as in torch.nn.functional.cross_entropy

EXIT_USER_ERROR = 2  # bad input: nothing was started
EXIT_DIVERGED = 65  # a bad step, and `guard` says to stop: the same again would end the same (EX_DATAERR)
EXIT_STALLED = 76  # a rank did not move for launch.timeout
EXIT_REQUEUE = 75  # stopped by a signal, saved: running the same command again goes on (EX_TEMPFAIL)
GENERATION_FILE = "generation_config.json"  # of a Hugging Face folder: ids that end an answer, sampling
