"""The real code of both ends, through deaths, lost messages, full disks and recoveries."""
