package consensus

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// hcLog lets the Raft libraries, which speak hclog, write to a slog.Logger.
type hcLog struct {
	to    *slog.Logger
	root  *slog.Logger // to without what With added
	name  string
	added []any
}

func newHCLog(to *slog.Logger) hclog.Logger { return &hcLog{to: to, root: to} }

func (l *hcLog) Log(level hclog.Level, msg string, args ...any) {
	to, ok := slogLevel(level)
	ctx := context.Background()
	if !ok || !l.to.Enabled(ctx, to) {
		return
	}
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
	}
	l.to.Log(ctx, to, msg, args...)
}

func slogLevel(level hclog.Level) (slog.Level, bool) {
	switch level {
	case hclog.Trace:
		return slog.LevelDebug - 4, true
	case hclog.Debug:
		return slog.LevelDebug, true
	case hclog.Info, hclog.NoLevel:
		return slog.LevelInfo, true
	case hclog.Warn:
		return slog.LevelWarn, true
	case hclog.Error:
		return slog.LevelError, true
	}
	return 0, false
}

func (l *hcLog) enabled(level slog.Level) bool { return l.to.Enabled(context.Background(), level) }

func (l *hcLog) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *hcLog) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *hcLog) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *hcLog) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *hcLog) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *hcLog) IsTrace() bool { return l.enabled(slog.LevelDebug - 4) }
func (l *hcLog) IsDebug() bool { return l.enabled(slog.LevelDebug) }
func (l *hcLog) IsInfo() bool  { return l.enabled(slog.LevelInfo) }
func (l *hcLog) IsWarn() bool  { return l.enabled(slog.LevelWarn) }
func (l *hcLog) IsError() bool { return l.enabled(slog.LevelError) }

func (l *hcLog) ImpliedArgs() []any { return l.added }

func (l *hcLog) With(args ...any) hclog.Logger {
	added := append(append([]any(nil), l.added...), args...)
	return &hcLog{to: l.root.With(added...), root: l.root, name: l.name, added: added}
}

func (l *hcLog) Name() string { return l.name }

func (l *hcLog) Named(name string) hclog.Logger {
	if l.name != "" {
		name = l.name + "." + name
	}
	return l.ResetNamed(name)
}

func (l *hcLog) ResetNamed(name string) hclog.Logger {
	c := *l
	c.name = name
	return &c
}

// SetLevel does nothing: the slog handler decides.
func (l *hcLog) SetLevel(hclog.Level) {}

func (l *hcLog) GetLevel() hclog.Level {
	for _, level := range []hclog.Level{hclog.Trace, hclog.Debug, hclog.Info, hclog.Warn} {
		if to, _ := slogLevel(level); l.enabled(to) {
			return level
		}
	}
	return hclog.Error
}

func (l *hcLog) StandardLogger(opts *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(opts), "", 0)
}

func (l *hcLog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return hcLogWriter{l} }

type hcLogWriter struct{ to *hcLog }

func (w hcLogWriter) Write(line []byte) (int, error) {
	w.to.Info(strings.TrimRight(string(line), "\n"))
	return len(line), nil
}
