package consensus

import (
	"sync"

	"github.com/hashicorp/raft"
)

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, at raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, target(id, at))
	if err != nil {
		return nil, err // Raft compares it
	}
	return newPipeline(p), nil
}

// pipeline takes answers from Raft's own pipeline whether Raft wants them or not. Raft ends their reader at the first
// one that refuses, while its writer may be in the midst of sending: then the pipeline waits for the reader, the writer
// for the pipeline, and nobody closes it. That member would be sent nothing any more by a leader that lives and beats,
// and Shutdown would wait for ever.
type pipeline struct {
	raft.AppendPipeline
	answers chan raft.AppendFuture
	closed  chan struct{}
	close   func() error
}

// unreadAnswers is how many answers may be left. The writer looks whether the reader has ended, at even odds, after
// each message that it sends.
const unreadAnswers = 1024

func newPipeline(p raft.AppendPipeline) *pipeline {
	w := &pipeline{AppendPipeline: p, answers: make(chan raft.AppendFuture, unreadAnswers), closed: make(chan struct{})}
	w.close = sync.OnceValue(func() error {
		close(w.closed)
		return p.Close()
	})
	go w.run()
	return w
}

func (p *pipeline) run() {
	for {
		select {
		case answer := <-p.AppendPipeline.Consumer():
			select {
			case p.answers <- answer:
			case <-p.closed:
				return
			}
		case <-p.closed:
			return
		}
	}
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.answers }

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error { return p.close() }
