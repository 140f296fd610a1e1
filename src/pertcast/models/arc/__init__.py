"""Run folders of arc-state's ``state tx train``: read without running any code of theirs, and written."""

from pertcast.models.arc.convert import ArcNames, ArcNetwork, convert_run
from pertcast.models.arc.export import write_arc_folder
from pertcast.models.arc.folder import ArcFolder, read_arc_folder
from pertcast.models.arc.names import network_names
from pertcast.models.arc.unpickle import hash_contents

__all__ = [
    "ArcFolder",
    "ArcNames",
    "ArcNetwork",
    "convert_run",
    "hash_contents",
    "network_names",
    "read_arc_folder",
    "write_arc_folder",
]
