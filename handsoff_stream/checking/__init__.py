"""Will the stream teach? Cross-validation on the labelled images, before anything is trained on a stream.

    report = check_files("ffhq.pkl", LabelledFiles(...), Path("check"))

`from_files` is the entry. `folds` divides the images, `learners` fits and trains on three quarters and labels the rest,
`scores` counts, `findings` compares, `words` says what follows from it; `table`, `pictures` and `page` show it.
"""

from handsoff_stream.checking.findings import ClassFinding, Findings, ImageFinding, Summary
from handsoff_stream.checking.from_files import CheckOptions, check_files
from handsoff_stream.checking.report import CheckReport
from handsoff_stream.checking.scores import Estimate

__all__ = [
    "CheckOptions",
    "CheckReport",
    "ClassFinding",
    "Estimate",
    "Findings",
    "ImageFinding",
    "Summary",
    "check_files",
]
