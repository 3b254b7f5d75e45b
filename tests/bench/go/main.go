// phaul-go moves a process within one host by the Go library phaul, as the library's own
// demonstration does (go-criu, test/phaul): client and server in one program, a socket pair for
// memory, the restore inside post-dump.
//
//	phaul-go PID DIRECTORY
//
// DIRECTORY is made, and the process is the first of a pid namespace of its own. The last line it
// prints is JSON: what was dumped.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/crit"
	"github.com/checkpoint-restore/go-criu/v7/phaul"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

const pageSize = 4096

// local takes the final dump and, in post-dump, restores from it.
type local struct {
	criu.NoNotify
	server *phaul.Server
	final  string
	began  time.Time
	steps  map[string]float64
}

func milliseconds(since time.Time) float64 {
	return float64(time.Since(since).Microseconds()) / 1000
}

// DumpCopyRestore is called once pre-copy is over; nil kills the source's tree.
func (l *local) DumpCopyRestore(c *criu.Criu, cfg phaul.Config, last string) error {
	dir, err := os.Open(l.final)
	if err != nil {
		return err
	}
	defer dir.Close()
	l.began = time.Now()
	err = c.Dump(&rpc.CriuOpts{
		Pid:         proto.Int32(cfg.Pid),
		LogLevel:    proto.Int32(4),
		LogFile:     proto.String("dump.log"),
		ImagesDirFd: proto.Int32(int32(dir.Fd())),
		TrackMem:    proto.Bool(true),
		ParentImg:   proto.String(last),
		Ps:          &rpc.CriuPageServerInfo{Fd: proto.Int32(int32(cfg.Memfd))},
	}, l)
	l.steps["dump and restore"] = milliseconds(l.began)
	return err
}

// PostDump brings the tree up while the source's is frozen.
func (l *local) PostDump() error {
	l.steps["dump"] = milliseconds(l.began)
	target := l.server.LastImagesDir()
	images, err := filepath.Glob(l.final + "/*.img")
	if err != nil {
		return err
	}
	for _, image := range images {
		if err := os.Link(image, filepath.Join(target, filepath.Base(image))); err != nil {
			return err
		}
	}
	dir, err := os.Open(target)
	if err != nil {
		return err
	}
	defer dir.Close()
	began := time.Now()
	err = l.server.GetCriu().Restore(&rpc.CriuOpts{
		LogLevel:    proto.Int32(4),
		LogFile:     proto.String("restore.log"),
		ImagesDirFd: proto.Int32(int32(dir.Fd())),
	}, nil)
	l.steps["restore"] = milliseconds(began)
	return err
}

type result struct {
	Pages      uint64             `json:"pages"`
	FinalPages uint64             `json:"final_pages"`
	Bytes      uint64             `json:"bytes"`
	Rounds     int                `json:"rounds"`
	Dumped     uint64             `json:"dumped_pages"`
	Steps      map[string]float64 `json:"steps"`
}

func run(pid int32, dir string) (*result, error) {
	client, server, final := dir+"/client", dir+"/server", dir+"/final"
	for _, path := range []string{dir, client, server, final} {
		if err := os.Mkdir(path, 0o700); err != nil {
			return nil, err
		}
	}
	fds, err := syscall.Socketpair(syscall.AF_LOCAL, syscall.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}
	srv, err := phaul.MakePhaulServer(phaul.Config{Pid: pid, Memfd: fds[1], Wdir: server})
	if err != nil {
		return nil, err
	}
	l := &local{server: srv, final: final, steps: map[string]float64{}}
	cln, err := phaul.MakePhaulClient(l, srv, phaul.Config{Pid: pid, Memfd: fds[0], Wdir: client})
	if err != nil {
		return nil, err
	}
	if err := cln.Migrate(); err != nil {
		return nil, err
	}
	stats, err := crit.GetDumpStats(final)
	if err != nil {
		return nil, err
	}
	written := stats.GetPagesWritten()
	found := &result{
		Pages:      written + stats.GetPagesSkippedParent(),
		FinalPages: written,
		Dumped:     written,
		Steps:      l.steps,
	}
	rounds, err := filepath.Glob(client + "/*")
	if err != nil {
		return nil, err
	}
	for _, round := range rounds {
		stats, err := crit.GetDumpStats(round)
		if err != nil {
			return nil, err
		}
		found.Dumped += stats.GetPagesWritten()
	}
	found.Rounds = len(rounds)
	found.Bytes = found.Dumped * pageSize
	return found, nil
}

func main() {
	err := errors.New("usage: phaul-go PID DIRECTORY")
	if len(os.Args) == 3 {
		var pid int64
		if pid, err = strconv.ParseInt(os.Args[1], 10, 32); err == nil {
			var found *result
			if found, err = run(int32(pid), os.Args[2]); err == nil {
				err = json.NewEncoder(os.Stdout).Encode(found)
			}
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "phaul-go:", err)
		os.Exit(1)
	}
}
