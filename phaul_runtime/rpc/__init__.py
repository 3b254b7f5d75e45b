"""Calls between client and agent: phaul.proto, values to messages and back, the calls themselves.

It imports transport and below; nothing below speaks protobuf. Read phaul.proto, then `client`.
"""
