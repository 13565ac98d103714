package txn

// Step is what the gateway must do next with a transaction whose COMMIT it holds back.
type Step uint8

// The steps. StepNudge may come any number of times before one of the others.
const (
	// StepNudge: the server holds changes back; make it send them (a savepoint, a row in quorate.nudge, a rollback to
	// the savepoint), emit seal and marker again, then ask again.
	StepNudge Step = iota + 1
	// StepLocal: nothing that is replicated was written: let COMMIT through now.
	StepLocal
	// StepAbort: roll back now; Event.Reason says why.
	StepAbort
	// StepRelease: its turn in the order has come: let COMMIT through now, if whoever released it has not done so for the session,
	// then report Committed or Lost.
	StepRelease
	// StepVisible, only after Lost or when the server is gone: the write set was applied from the log and is visible, or
	// will be first of all when the server is back. The transaction did commit, but what else the rollback undid here
	// (SET, temporary tables, cursors) is gone, so the session must end.
	StepVisible
	// StepUnknown: the outcome cannot be known now; only the log decides.
	StepUnknown
)

var stepNames = [...]string{"none", "nudge", "local", "abort", "release", "visible", "unknown"}

// String returns the step's name for logs.
func (s Step) String() string {
	if int(s) < len(stepNames) {
		return stepNames[s]
	}
	return "invalid"
}

// Event is one step with its circumstances.
type Event struct {
	Step   Step
	Reason AbortReason // of StepAbort
	CSN    CSN         // its place in the order, of StepRelease and StepVisible
	With   CSN         // of StepAbort for a conflict: the transaction that it lost to
}
