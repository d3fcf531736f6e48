"""kohya's own files: the key names of `lycoris`, with the header that sd-scripts writes and webui reads.

A single word without weights is written in the form of sd-scripts; see `embedding`.
"""

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats import embedding, lycoris
from diffgraft.adapters.formats.families import with_inferred_family
from diffgraft.adapters.formats.kohya_header import kohya_header


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header. Raises ValueError for contents that such files cannot hold."""
    if not adapter.deltas:
        return embedding.write_nameless(adapter)
    adapter = with_inferred_family(adapter)
    tensors, header = lycoris.write(adapter)
    return tensors, {**header, **kohya_header(adapter, tensors)}


DIALECT = Dialect(
    name="kohya",
    summary="the files of kohya's sd-scripts, which most programs open",
    order=110,
    write=write,
    auto=20,
)
