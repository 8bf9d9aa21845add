"""Studies: the paper's claims on small models, each a plan in conf/study/ and one command."""
