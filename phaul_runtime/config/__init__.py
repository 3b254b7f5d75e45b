"""The configuration: a YAML file, its model, who may send what.

It imports hooks and below; transports and all above are given a `Config`. Read `model`.
"""
