"""The page of a study."""
from pathlib import Path
def write_page(plan, config, places):
    return places.out
