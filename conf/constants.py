"""Values shared by packages that must not import each other."""

IGNORE_INDEX = -100  # label without loss, as in torch.nn.functional.cross_entropy

EXIT_USER_ERROR = 2  # bad input: nothing was started
EXIT_REQUEUE = 75  # stopped by a signal, saved: running the same command again goes on (EX_TEMPFAIL)
