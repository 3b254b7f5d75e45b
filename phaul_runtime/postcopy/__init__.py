"""Post-copy: the copy runs while some of its pages are still with the process it was copied from.

The source's tree stays frozen for good; CRIU dumped it with `lazy_pages`, so its page maps name
pages that are in no image. Those come over a channel, what the copy touches first, into a store at
the destination that the pager reads (`pager.network_pages`). A page that has not come blocks who
touches it; it is never read as zero. A channel may break and a new one go on, an agent may die and
another take over: what has come is in the store, and each channel begins with a list of it.

It imports rpc and below; source, destination and recovery import it. Read `protocol` first.

::

    pages          which pages, numbered alike at both ends
    store          the destination's files for them
    protocol       what is said on the channel
    sender         the source: reads the frozen tree's memory and sends it
    receiver       the destination: asks, stores, tells the pager
    late           the destination's channels, one after the other
    transfer       the source's side of all of it, until the copy needs nothing more
"""
