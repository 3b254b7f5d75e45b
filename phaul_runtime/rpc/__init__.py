"""The control channel's messages: phaul.proto and what is generated from it."""
