"""Read and write run folders of arc-state's ``state tx train``, without running any of their code."""

from pertcast.arc.convert import ArcNames, ArcNetwork, convert_run, network_names
from pertcast.arc.export import write_arc_folder
from pertcast.arc.read_folder import ArcFolder, read_arc_folder
from pertcast.arc.safe_unpickle import hash_contents

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
