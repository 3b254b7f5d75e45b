"""Pages and images: directories, page maps, receiving a round, planning a lazy restore.

It imports criu and system; the library and all above import it. Read `image_dirs`, then
`pagemap`.
"""
